// Line charts in SVG, drawn again when their width changes.

import { h, s } from "./dom.js";
import { number } from "./words.js";

const LEFT = 58;
const RIGHT = 20;
const TOP = 10;
const BOTTOM = 38;

/** Return round numbers for the ticks of an axis. */
export function ticks(least, most, log, n = 5) {
  if (log) {
    const found = [];
    const decades = Math.log10(most / least);
    for (let power = Math.floor(Math.log10(least)); power <= Math.log10(most) + 1e-9; power++) {
      for (const digit of decades > 3 ? [1] : decades > 1 ? [1, 3] : [1, 2, 5]) {
        const value = digit * 10 ** power;
        if (value >= least * 0.999 && value <= most * 1.001) found.push(value);
      }
    }
    return found.length > 9 ? found.filter((_, i) => i % Math.ceil(found.length / 7) === 0) : found;
  }
  const rough = (most - least) / n || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough);
  const found = [];
  for (let value = Math.ceil(least / step) * step; value <= most + step / 1e6; value += step)
    found.push(Math.abs(value) < step / 1e6 ? 0 : value);
  return found;
}

/**
 * A chart. `label` summarises it in words; `x` and `y` are { label, log, least, most, format }; limits that are
 * missing are those of the data.
 */
export class Chart {
  constructor({ label, x, y, height = 260 }) {
    Object.assign(this, { x, y, height, series: [] });
    this.svg = s("svg", { role: "img", "aria-label": label, class: "chart" });
    this.legend = h("div", { class: "keys" });
    this.element = h("div", { class: "charted" }, this.svg, this.legend);
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.element);
  }

  /** Show series: { name, class, points: [[x, y], ...], dots, bars: [[x, low, high], ...] }. */
  show(series, label) {
    this.series = series;
    if (label) this.svg.setAttribute("aria-label", label);
    this.legend.replaceChildren(
      ...series
        .filter((one) => one.name)
        .map((one) => h("span", { class: `key ${one.class}`, text: one.name })),
    );
    this.draw();
  }

  limits(axis, k) {
    const values = this.series
      .flatMap((one) => [
        ...one.points.map((point) => point[k]),
        ...(one.bars ?? []).flatMap((bar) => (k ? [bar[1], bar[2]] : [bar[0]])),
      ])
      .filter((value) => Number.isFinite(value) && (!axis.log || value > 0));
    const least = axis.least ?? values.reduce((a, b) => Math.min(a, b), Infinity);
    const most = axis.most ?? values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (!Number.isFinite(least) || !Number.isFinite(most)) return axis.log ? [1, 10] : [0, 1];
    if (least < most) return [least, most];
    return axis.log ? [least / 2, most * 2] : [least - 0.5, most + 0.5];
  }

  draw() {
    const width = Math.max(260, this.element.clientWidth || 640);
    const { height } = this;
    const [x0, x1] = this.limits(this.x, 0);
    const [y0, y1] = this.limits(this.y, 1);
    const place = (axis, least, most, from, to) => (value) => {
      const part = axis.log
        ? Math.log(Math.max(value, least / 1e3) / least) / Math.log(most / least)
        : (value - least) / (most - least);
      return from + part * (to - from);
    };
    const px = place(this.x, x0, x1, LEFT, width - RIGHT);
    const py = place(this.y, y0, y1, height - BOTTOM, TOP);
    const format = (axis, value) => (axis.format ? axis.format(value) : number(value, 3));
    const few = width < 420 ? 3 : 6;
    const frame = s(
      "g",
      { class: "frame" },
      (this.y.ticks ?? ticks(y0, y1, this.y.log, 4)).map((value) => [
        s("line", { x1: LEFT, x2: width - RIGHT, y1: py(value), y2: py(value) }),
        s("text", { x: LEFT - 6, y: py(value) + 4, "text-anchor": "end", text: format(this.y, value) }),
      ]),
      (this.x.ticks ?? ticks(x0, x1, this.x.log, few)).map((value) =>
        s("text", {
          x: px(value),
          y: height - BOTTOM + 16,
          "text-anchor": "middle",
          text: format(this.x, value),
        }),
      ),
      s("text", {
        x: (LEFT + width - RIGHT) / 2,
        y: height - 4,
        "text-anchor": "middle",
        class: "title",
        text: this.x.label,
      }),
      s("text", {
        x: 0,
        y: 0,
        transform: `translate(11 ${(TOP + height - BOTTOM) / 2}) rotate(-90)`,
        "text-anchor": "middle",
        class: "title",
        text: this.y.label,
      }),
    );
    const drawn = this.series.map((one) => {
      const visible = one.points.filter(
        (point) => point.every(Number.isFinite) && (!this.y.log || point[1] > 0),
      );
      const path = visible
        .map(([x, y], i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`)
        .join("");
      return s(
        "g",
        { class: one.class },
        one.dots === "only" ? null : s("path", { d: path || "M0 0", fill: "none" }),
        (one.bars ?? []).map(([x, low, high]) =>
          s("line", { class: "range", x1: px(x), x2: px(x), y1: py(low), y2: py(Math.min(high, y1)) }),
        ),
        one.dots ? visible.map(([x, y]) => s("circle", { cx: px(x), cy: py(y), r: 3.5 })) : null,
      );
    });
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("height", height);
    this.svg.replaceChildren(
      frame,
      s(
        "svg",
        {
          x: 0,
          y: TOP - 6,
          width,
          height: height - BOTTOM - TOP + 12,
          viewBox: `0 ${TOP - 6} ${width} ${height - BOTTOM - TOP + 12}`,
        },
        drawn,
      ),
    );
  }

  close() {
    this.observer.disconnect();
  }
}
