// A text as its tokens, coloured by what the model does at each, one of which is chosen.

import { field, h, select } from "./dom.js";
import { scaleOf } from "./maps.js";
import { number, t } from "./words.js";

const linear = (values) => {
  const most = values.reduce((a, b) => Math.max(a, b), 1e-9);
  return (value) => value / most;
};
let by = null; // what colours texts, last chosen

export class TokenText {
  constructor(report, measures, choose) {
    Object.assign(this, { measures, chosen: choose, index: 0, weights: null });
    this.spans = report.tokens.map(({ text }, i) =>
      h("span", {
        role: "option",
        class: "token",
        tabindex: -1,
        "aria-selected": "false",
        text,
        "data-index": i,
      }),
    );
    this.list = h("div", {
      class: "tokens",
      role: "listbox",
      "aria-label": t("in.tokens"),
      "aria-orientation": "horizontal",
      dir: "auto",
    });
    for (const span of this.spans) {
      this.list.append(span);
      if (span.textContent.includes("↵")) this.list.append(h("br"));
    }
    this.list.addEventListener("click", (event) => {
      const span = event.target.closest(".token");
      if (span) this.choose(Number(span.dataset.index));
    });
    this.list.addEventListener("keydown", (event) => this.key(event));
    this.menu = h("div");
    this.reading = h("p", { class: "reading" });
    this.element = h(
      "section",
      { class: "card" },
      h("h2", { text: t("in.read") }),
      h("p", { text: t("in.read.what") }),
      this.menu,
      this.list,
      this.reading,
    );
    this.options();
    this.paint();
  }

  options() {
    const given = [
      ...this.measures.map(([name, label]) => [name, label]),
      ...(this.weights ? [["attention", t("in.by.attention")]] : []),
    ];
    if (!given.some(([name]) => name === by)) by = given[0][0];
    this.menu.replaceChildren(
      field(
        t("in.by"),
        select(given, by, (value) => {
          by = value;
          this.paint();
        }),
      ),
    );
  }

  /** Offer the weights with which the chosen token attends to those before it. */
  attention({ shape: [, n], values }, index) {
    const first = !this.weights;
    this.weights = Array.from({ length: n }, (_, j) => (j <= index ? Math.abs(values[index * n + j]) : null));
    if (first) this.options();
    if (by === "attention") this.paint();
  }

  values() {
    return by === "attention" && this.weights
      ? this.weights
      : (this.measures.find(([name]) => name === by) ?? this.measures[0])[2];
  }

  paint() {
    const values = this.values();
    const given = values.filter((value) => value !== null);
    const scale = by === "surprise" ? linear(given) : scaleOf(given); // bits are logarithms already
    this.spans.forEach((span, i) => {
      span.style.setProperty("--share", values[i] === null ? 0 : scale(values[i]).toFixed(3));
      span.title = values[i] === null ? "" : number(values[i]);
    });
    this.describe();
  }

  describe() {
    const value = this.values()[this.index];
    const text = this.spans[this.index].textContent;
    this.reading.textContent = t(
      "in.chosen",
      this.index + 1,
      this.spans.length,
      text,
      value === null ? "–" : number(value),
    );
  }

  choose(index, focus = false) {
    this.spans[this.index].setAttribute("aria-selected", "false");
    this.spans[this.index].tabIndex = -1;
    this.index = Math.min(this.spans.length - 1, Math.max(0, index));
    const span = this.spans[this.index];
    span.setAttribute("aria-selected", "true");
    span.tabIndex = 0;
    if (focus) span.focus();
    this.chosen(this.index);
    this.describe();
  }

  key(event) {
    const steps = {
      ArrowLeft: -1,
      ArrowRight: 1,
      ArrowUp: -10,
      ArrowDown: 10,
      Home: -Infinity,
      End: Infinity,
    };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.choose(this.index + steps[event.key], true);
  }
}
