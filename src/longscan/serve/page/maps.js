// Heat maps on canvases: perceptually even colours, a reading of any cell, a summary in words, and a table.

import { h, tableOf } from "./dom.js";
import { number, t } from "./words.js";

// cividis: even in lightness, and the same to all common kinds of colour vision
const EVEN =
  "00224e002e6a1a386f32436d434e6c535a6d61656f6f70737d7c788c88789b9476aba072bcae6ccdbb63dec958f0d846fee838";
const CELLS = 30_000; // of a table
const DECADES = 3; // of a logarithmic scale, at most

/** Return an array of the server: its shape and values. */
export function decode({ shape, float32 }) {
  const raw = atob(float32);
  const view = new DataView(Uint8Array.from(raw, (char) => char.charCodeAt(0)).buffer);
  const values = Float32Array.from({ length: raw.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  return { shape, values };
}

/** Return [red, green, blue] of a number from 0 to 1. */
export function colour(x) {
  const stops = EVEN.length / 6 - 1;
  const at = Math.min(Math.max(x, 0), 1) * stops;
  const left = Math.min(Math.floor(at), stops - 1);
  const part = (i, k) => parseInt(EVEN.slice(6 * i + 2 * k, 6 * i + 2 * k + 2), 16);
  return [0, 1, 2].map((k) => Math.round(part(left, k) + (at - left) * (part(left + 1, k) - part(left, k))));
}

/** Return the scale of positive values: a function to 0 ... 1, logarithmic over three decades at most. */
export function scaleOf(values) {
  let least = Infinity;
  let most = 0;
  for (const value of values) {
    if (value > 0) least = Math.min(least, value);
    most = Math.max(most, value);
  }
  if (!(most > 0)) return Object.assign(() => 0, { least: 0, most: 0 });
  least = Math.max(least, most / 10 ** DECADES);
  const span = Math.log(most / least) || 1;
  return Object.assign((value) => (value > least ? Math.log(value / least) / span : 0), { least, most });
}

/** Return the scale of values of both signs: an even one from -most to most. */
function signed(values) {
  const most = values.reduce((found, value) => Math.max(found, Math.abs(value)), 0);
  return Object.assign((value) => (value / (most || 1) + 1) / 2, { least: -most, most });
}

/**
 * A heat map of a matrix. `rows` and `columns` name its lines, `read(row, column, value)` describes a cell,
 * `pick(row, column)` is called when one is chosen, `shown(row, column)` says which cells there are.
 */
export class HeatMap {
  constructor({ array, rows, columns, label, axes, read, pick, shown = () => true, square = false }) {
    Object.assign(this, { array, rows, columns, read, pick, shown });
    const [n, m] = array.shape;
    const inside = array.values.filter((_, i) => shown(Math.floor(i / m), i % m));
    this.scale = inside.some((value) => value < 0) ? signed(inside) : scaleOf(inside);
    this.canvas = h("canvas", {
      width: m,
      height: n,
      tabindex: 0,
      role: "img",
      "aria-label": `${label}. ${this.summary(label)}`,
    });
    this.cursor = h("div", { class: "cursor", hidden: true });
    this.column = h("div", { class: "column", hidden: true });
    this.reading = h("output", { class: "reading", text: this.summary() });
    this.at = null;
    const bar = h("canvas", { width: 128, height: 1, class: "scale", "aria-hidden": "true" });
    this.element = h(
      "figure",
      { class: `map ${square ? "square" : "wide"}` },
      h(
        "figcaption",
        {},
        h("span", { text: label }),
        h("span", { class: "legend" }, number(this.scale.least, 2), bar, number(this.scale.most, 2)),
      ),
      h(
        "div",
        { class: "axes" },
        h("span", { class: "vertical", text: axes[0] }),
        h(
          "span",
          { class: "ticks", "aria-hidden": "true" },
          square ? null : [h("span", { text: rows.at(-1) }), h("span", { text: rows[0] })],
        ),
        h("div", { class: "plot" }, this.canvas, this.cursor, this.column),
        h("span", { class: "horizontal", text: axes[1] }),
      ),
      this.reading,
      n * m > CELLS
        ? this.largest(label, axes)
        : tableOf(t("table"), label, () => [
            [`${axes[0]} / ${axes[1]}`, ...columns],
            ...rows.map((name, i) => [
              name,
              ...columns.map((_, j) => (shown(i, j) ? number(array.values[i * m + j]) : "")),
            ]),
          ]),
    );
    this.flipped = !square; // layers grow upwards, as the text passes through them; queries go down the page
    if (!square) this.canvas.style.height = `${Math.min(Math.max(n * 14, 84), 320)}px`;
    this.paint(this.canvas, n, m);
    this.paintScale(bar);
    this.listen();
  }

  /** Return a table of the largest values, of a map with too many for one of all. */
  largest(label, axes) {
    const { values, shape } = this.array;
    const most = 200;
    return tableOf(t("map.most", most), label, () => {
      const order = Array.from(values.keys()).filter((i) =>
        this.shown(Math.floor(i / shape[1]), i % shape[1]),
      );
      order.sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]));
      return [
        [...axes, t("value")],
        ...order
          .slice(0, most)
          .map((i) => [this.rows[Math.floor(i / shape[1])], this.columns[i % shape[1]], number(values[i])]),
      ];
    });
  }

  paint(canvas, n, m) {
    const context = canvas.getContext("2d");
    const image = context.createImageData(m, n);
    for (let i = 0; i < n; i++) {
      const y = this.flipped ? n - 1 - i : i;
      for (let j = 0; j < m; j++) {
        const to = 4 * (y * m + j);
        if (!this.shown(i, j)) continue;
        image.data.set([...colour(this.scale(this.array.values[i * m + j])), 255], to);
      }
    }
    context.putImageData(image, 0, 0);
  }

  paintScale(bar) {
    const context = bar.getContext("2d");
    const image = context.createImageData(128, 1);
    for (let i = 0; i < 128; i++) image.data.set([...colour(i / 127), 255], 4 * i);
    context.putImageData(image, 0, 0);
  }

  summary() {
    const [n, m] = this.array.shape;
    let best = -1;
    this.array.values.forEach((value, i) => {
      if (this.shown(Math.floor(i / m), i % m) && (best < 0 || value > this.array.values[best])) best = i;
    });
    return t("map.summary", n, m, this.read(Math.floor(best / m), best % m, this.array.values[best]));
  }

  listen() {
    const { canvas } = this;
    const [n, m] = this.array.shape;
    const cell = (event) => {
      const box = canvas.getBoundingClientRect();
      const at = (position, size, count) =>
        Math.min(count - 1, Math.max(0, Math.floor((position / size) * count)));
      const y = at(event.clientY - box.top, box.height, n);
      return [this.flipped ? n - 1 - y : y, at(event.clientX - box.left, box.width, m)];
    };
    canvas.addEventListener("pointermove", (event) => this.move(...cell(event)));
    canvas.addEventListener("pointerleave", () => {
      this.cursor.hidden = document.activeElement !== canvas;
    });
    canvas.addEventListener("click", (event) => {
      this.move(...cell(event));
      this.pick?.(...this.at);
    });
    canvas.addEventListener("focus", () => this.move(...(this.at ?? [0, 0])));
    canvas.addEventListener("blur", () => {
      this.cursor.hidden = true;
    });
    canvas.addEventListener("keydown", (event) => {
      const up = this.flipped ? 1 : -1;
      const steps = {
        ArrowUp: [up, 0],
        ArrowDown: [-up, 0],
        ArrowLeft: [0, -1],
        ArrowRight: [0, 1],
        Home: [0, -m],
        End: [0, m],
      };
      if (event.key === "Enter" || event.key === " ") this.pick?.(...(this.at ?? [0, 0]));
      else if (!(event.key in steps)) return;
      else {
        const [row, column] = this.at ?? [0, 0];
        this.move(row + steps[event.key][0], column + steps[event.key][1]);
      }
      event.preventDefault();
    });
  }

  move(row, column) {
    const [n, m] = this.array.shape;
    this.at = [Math.min(n - 1, Math.max(0, row)), Math.min(m - 1, Math.max(0, column))];
    const [i, j] = this.at;
    const y = this.flipped ? n - 1 - i : i;
    Object.assign(this.cursor.style, {
      left: `${(100 * j) / m}%`,
      width: `${100 / m}%`,
      top: `${(100 * y) / n}%`,
      height: `${100 / n}%`,
    });
    this.cursor.hidden = false;
    this.reading.textContent = this.shown(i, j)
      ? this.read(i, j, this.array.values[i * m + j])
      : t("map.none");
  }

  /** Mark a column: the token that is chosen in the text. */
  mark(column) {
    const [n, m] = this.array.shape;
    Object.assign(
      this.column.style,
      this.flipped
        ? { left: `${(100 * column) / m}%`, width: `${100 / m}%` }
        : { top: `${(100 * column) / n}%`, height: `${100 / n}%`, width: "100%" },
    );
    this.column.hidden = false;
  }
}
