// A playground for HiPPO: draw a signal, and see what N coefficients remember of it.

import { button, field, h, s, select, still, tableOf } from "./dom.js";
import { compress, MEASURES, reconstruct } from "./hippo.js";
import { number, t } from "./words.js";

const N = 400; // samples
const WIDTH = 800;
const HEIGHT = 260;
const STEP = 4; // samples that an arrow key moves the pen

const SIGNALS = {
  song: (x) =>
    0.45 * Math.sin(27 * x) * (0.6 + 0.4 * Math.sin(7 * x)) +
    0.15 * Math.sin(8 * x) +
    0.3 * Math.sin(75 * x + 1) * Math.exp(-(((x - 0.62) / 0.14) ** 2)),
  sine: (x) => 0.8 * Math.sin(6 * Math.PI * x),
  chirp: (x) => 0.8 * Math.sin(2 * Math.PI * (1.5 * x + 7 * x * x)),
  steps: (x) => [0.2, 0.8, -0.5, 0.4, -0.8][Math.min(4, Math.floor(5 * x))],
  flat: () => 0,
};

// they stay while other views are shown
const kept = { signal: sampled("song"), measure: "legs", n: 24, seen: N, window: 100 };

function sampled(name) {
  return Float64Array.from({ length: N }, (_, i) => SIGNALS[name](i / (N - 1)));
}

/** Show the view in an element. */
export function mount(root) {
  const view = new View(root);
  return () => view.pause();
}

class View {
  constructor(root) {
    this.pen = Math.floor(N / 2);
    this.timer = 0;
    this.signal = s("path", { class: "signal" });
    this.fit = s("path", { class: "fit" });
    this.now = s("line", { class: "now", y1: 0, y2: HEIGHT });
    this.oldest = s("rect", { class: "gone", x: 0, y: 0, height: HEIGHT });
    this.dot = s("circle", { class: "pen", r: 6, visibility: "hidden" });
    this.board = s(
      "svg",
      {
        class: "board",
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
        preserveAspectRatio: "none",
        role: "img",
        tabindex: 0,
      },
      this.oldest,
      s("line", { class: "zero", x1: 0, x2: WIDTH, y1: HEIGHT / 2, y2: HEIGHT / 2 }),
      this.signal,
      this.fit,
      this.now,
      this.dot,
    );
    this.reading = h("output", { class: "reading" });
    this.bars = s("svg", {
      class: "bars",
      viewBox: `0 0 ${WIDTH} 160`,
      preserveAspectRatio: "none",
      role: "img",
    });
    this.formula = h("p", { class: "note" });
    this.seen = this.range("seen", 10, N, 1, (value) => t("hippo.seen.value", value));
    this.window = this.range("window", 10, 100, 5, (value) => `${value} %`);
    this.play = button(t("hippo.play"), () => this.toggle());
    const measure = select(
      Object.keys(MEASURES).map((name) => [name, t(`hippo.${name}`)]),
      kept.measure,
      (value) => {
        kept.measure = value;
        this.draw();
      },
      { id: "measure" },
    );
    this.table = h("div");
    root.append(
      h(
        "section",
        { "aria-label": t("nav.hippo") },
        h("h1", { text: t("hippo.title") }),
        h("p", { class: "lead", text: t("hippo.lead") }),
        h(
          "div",
          { class: "card" },
          h(
            "div",
            { class: "tools", role: "group", "aria-label": t("hippo.signals") },
            Object.keys(SIGNALS).map((name) =>
              button(t(`hippo.${name}`), () => {
                kept.signal = sampled(name);
                this.draw();
              }),
            ),
            this.play,
          ),
          this.board,
          h(
            "div",
            { class: "keys" },
            h("span", { class: "key first", text: t("hippo.fit") }),
            h("span", { class: "key ink", text: t("hippo.signal") }),
          ),
          this.reading,
          h("p", { class: "hint", text: t("hippo.keys") }),
          h(
            "div",
            { class: "grid wide" },
            field(t("hippo.measure"), measure),
            this.range("n", 2, 64, 2, (value) => value),
            this.window,
            this.seen,
          ),
          this.formula,
        ),
        h(
          "div",
          { class: "card" },
          h("h2", { text: t("hippo.coefficients") }),
          h("p", { text: t("hippo.coefficients.what") }),
          this.bars,
          this.table,
        ),
      ),
    );
    this.listen();
    this.draw();
  }

  range(name, min, max, step, shown) {
    const value = h("output", { text: shown(kept[name]) });
    const input = h("input", { type: "range", min, max, step, value: kept[name], id: `hippo-${name}` });
    input.addEventListener("input", () => {
      kept[name] = input.valueAsNumber;
      value.textContent = shown(kept[name]);
      this.draw();
    });
    const label = h(
      "label",
      { class: "field", for: input.id },
      h("span", {}, `${t(`hippo.set.${name}`)}: `, value),
      input,
    );
    return Object.assign(label, {
      set: (next) => {
        input.value = next;
        input.dispatchEvent(new Event("input"));
      },
    });
  }

  listen() {
    let last = null;
    const at = (event) => {
      const box = this.board.getBoundingClientRect();
      const i = Math.round(((event.clientX - box.left) / box.width) * (N - 1));
      const value = 1 - (2 * (event.clientY - box.top)) / box.height;
      return [Math.min(N - 1, Math.max(0, i)), Math.min(1, Math.max(-1, value))];
    };
    this.board.addEventListener("pointerdown", (event) => {
      this.board.setPointerCapture(event.pointerId);
      last = at(event);
      this.line(last, last);
      event.preventDefault();
      this.board.focus({ preventScroll: true });
    });
    this.board.addEventListener("pointermove", (event) => {
      if (!last) return;
      const next = at(event);
      this.line(last, next);
      last = next;
    });
    for (const name of ["pointerup", "pointercancel"])
      this.board.addEventListener(name, () => {
        last = null;
      });
    this.board.addEventListener("focus", () => this.draw());
    this.board.addEventListener("blur", () => this.draw());
    this.board.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const move = { ArrowLeft: -STEP, ArrowRight: STEP, Home: -N, End: N }[event.key];
    const rise = { ArrowUp: 0.05, ArrowDown: -0.05 }[event.key];
    if (move === undefined && rise === undefined) return;
    event.preventDefault();
    if (move !== undefined) {
      const before = this.pen;
      this.pen = Math.min(N - 1, Math.max(0, this.pen + move));
      if (event.shiftKey) this.line([before, kept.signal[before]], [this.pen, kept.signal[before]]); // draw along
    } else {
      for (let i = -12; i <= 12; i++) {
        // a bump, so that the signal stays smooth
        const j = this.pen + i;
        if (j >= 0 && j < N)
          kept.signal[j] = Math.min(
            1,
            Math.max(-1, kept.signal[j] + (rise * (1 + Math.cos((Math.PI * i) / 13))) / 2),
          );
      }
    }
    this.draw();
  }

  line([i0, v0], [i1, v1]) {
    const [from, to] = i0 < i1 ? [i0, i1] : [i1, i0];
    for (let i = from; i <= to; i++)
      kept.signal[i] = i0 === i1 ? v1 : v0 + ((v1 - v0) * (i - i0)) / (i1 - i0);
    this.pen = i1;
    this.draw();
  }

  draw() {
    const { signal, measure, n, seen } = kept;
    this.window.hidden = measure === "legs";
    const window_ = Math.max(2, (kept.window / 100) * N);
    const memory = compress(signal.slice(0, seen), n, measure, window_);
    const fit = reconstruct(memory);
    const x = (i) => (i / (N - 1)) * WIDTH;
    const y = (value) => ((1 - Math.min(3, Math.max(-3, value))) / 2) * HEIGHT;
    const path = (values, from) =>
      Array.from(
        values,
        (value, i) => `${i ? "L" : "M"}${x(from + i).toFixed(1)} ${y(value).toFixed(1)}`,
      ).join("");
    this.signal.setAttribute("d", path(signal, 0));
    this.fit.setAttribute("d", path(fit, memory.oldest));
    this.now.setAttribute("x1", x(seen - 1));
    this.now.setAttribute("x2", x(seen - 1));
    this.oldest.setAttribute("width", x(memory.oldest));
    this.dot.setAttribute("cx", x(this.pen));
    this.dot.setAttribute("cy", y(signal[this.pen]));
    this.dot.setAttribute("visibility", document.activeElement === this.board ? "visible" : "hidden");
    const error = Math.sqrt(
      fit.reduce((sum, value, i) => sum + (value - signal[memory.oldest + i]) ** 2, 0) / fit.length,
    );
    const said = t("hippo.summary", number(n), number(fit.length), number(error, 2));
    this.reading.textContent = said;
    this.board.setAttribute("aria-label", `${t("hippo.board")} ${said}`);
    this.formula.textContent = t(measure === "legs" ? "hippo.formula.legs" : "hippo.formula");
    this.coefficients(memory.c);
  }

  coefficients(c) {
    const most = c.reduce((found, value) => Math.max(found, Math.abs(value)), 0) || 1;
    const width = WIDTH / c.length;
    this.bars.replaceChildren(
      s("line", { class: "zero", x1: 0, x2: WIDTH, y1: 80, y2: 80 }),
      ...Array.from(c, (value, i) =>
        s("rect", {
          x: i * width + width * 0.15,
          width: width * 0.7,
          y: value > 0 ? 80 - (76 * value) / most : 80,
          height: Math.max(0.5, (76 * Math.abs(value)) / most),
        }),
      ),
    );
    const largest = c.reduce((best, value, i) => (Math.abs(value) > Math.abs(c[best]) ? i : best), 0);
    this.bars.setAttribute("aria-label", t("hippo.bars", c.length, largest, number(c[largest])));
    const open = this.table.firstElementChild?.open ?? false;
    const table = tableOf(t("table"), t("hippo.coefficients"), () => [
      ["n", "c"],
      ...Array.from(c, (value, i) => [String(i), value.toFixed(6)]),
    ]);
    this.table.replaceChildren(table);
    table.open = open;
  }

  toggle() {
    if (this.timer) return this.pause();
    if (still()) return this.seen.set(kept.seen >= N ? 40 : Math.min(N, kept.seen + 40));
    if (kept.seen >= N) this.seen.set(10);
    this.play.textContent = t("hippo.pause");
    const step = () => {
      this.seen.set(Math.min(N, kept.seen + 2));
      if (kept.seen < N) this.timer = requestAnimationFrame(step);
      else this.pause();
    };
    this.timer = requestAnimationFrame(step);
    return undefined;
  }

  pause() {
    cancelAnimationFrame(this.timer);
    this.timer = 0;
    this.play.textContent = t("hippo.play");
  }
}
