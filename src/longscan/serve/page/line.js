// The line of models: who descends from whom, as arcs beside a list.

import { json } from "./api.js";
import { h, s } from "./dom.js";
import { IDEAS } from "./ideas.js";
import { current, t } from "./words.js";

const GUTTER = 132; // px beside the list, for the arcs
const NARROW = 56;

/** Show the view in an element. */
export function mount(root) {
  const view = new View(root);
  return () => view.observer.disconnect();
}

class View {
  constructor(root) {
    this.alert = h("p", { class: "alert", role: "alert" });
    this.arcs = s("svg", { class: "arcs", "aria-hidden": "true" });
    this.list = h("ol", { class: "lineage" });
    this.graph = h("div", { class: "graph" }, this.arcs, this.list);
    this.observer = new ResizeObserver(() => this.draw());
    this.models = [];
    this.rows = new Map();
    root.append(
      h(
        "section",
        { "aria-label": t("nav.line") },
        h("h1", { text: t("line.title") }),
        h("p", { class: "lead", text: t("line.lead") }),
        this.alert,
        this.graph,
      ),
    );
    this.load();
  }

  async load() {
    try {
      this.models = await json("line");
    } catch (error) {
      this.alert.textContent = error.message;
      return;
    }
    for (const model of this.models) {
      const row = this.row(model);
      this.rows.set(model.name, row);
      this.list.append(row);
    }
    this.observer.observe(this.list);
  }

  row({ name, year, paper, arxiv, idea, parents, kind }) {
    const children = this.models.filter((one) => one.parents.includes(name)).map((one) => one.name);
    const links = (names) =>
      names.flatMap((one, i) => [
        i ? ", " : "",
        h("a", {
          href: "#line",
          text: one,
          onclick: (event) => {
            event.preventDefault();
            const row = this.rows.get(one);
            row.querySelector("h2").focus();
            row.scrollIntoView({ block: "nearest" });
          },
        }),
      ]);
    const row = h(
      "li",
      { class: `model ${kind}`, id: `model-${name}` },
      h(
        "div",
        { class: "title" },
        h("span", { class: "year", text: year }),
        h("h2", { text: name, tabindex: -1 }),
        h("span", { class: "idea", text: t("line.memory", (current() === "zh" && IDEAS[name]) || idea) }),
      ),
      h(
        "p",
        { class: "paper" },
        h("cite", { text: paper, lang: "en" }),
        " ",
        arxiv
          ? h("a", {
              href: `https://arxiv.org/abs/${arxiv}`,
              target: "_blank",
              rel: "noopener noreferrer",
              text: `arXiv ${arxiv}`,
            })
          : null,
      ),
      parents.length || children.length
        ? h(
            "p",
            { class: "kin" },
            parents.length ? h("span", {}, `${t("line.from")} `, ...links(parents)) : null,
            children.length ? h("span", {}, `${t("line.to")} `, ...links(children)) : null,
          )
        : null,
    );
    row.addEventListener("pointerenter", () => this.light(name));
    row.addEventListener("pointerleave", () => this.light(null));
    row.addEventListener("focusin", () => this.light(name));
    row.addEventListener("focusout", () => this.light(null));
    return row;
  }

  /** Mark a model, all it descends from, and all that descends from it. */
  light(name) {
    const parents = new Map(this.models.map((one) => [one.name, one.parents]));
    const marked = new Set(name ? [name] : []);
    const up = (one) =>
      parents.get(one).forEach((parent) => {
        marked.add(parent);
        up(parent);
      });
    const down = (one) =>
      parents.forEach((list, child) => {
        if (list.includes(one)) {
          marked.add(child);
          down(child);
        }
      });
    const before = new Set();
    if (name) {
      up(name);
      for (const one of marked) before.add(one);
      down(name);
    }
    for (const [one, row] of this.rows) row.classList.toggle("lit", marked.has(one));
    const after = new Set([name, ...[...marked].filter((one) => !before.has(one))]);
    const lit = (a, b) => (before.has(a) && before.has(b)) || (after.has(a) && after.has(b));
    for (const arc of this.arcs.querySelectorAll("path"))
      arc.classList.toggle("lit", lit(arc.dataset.parent, arc.dataset.child));
  }

  draw() {
    const top = this.list.getBoundingClientRect().top;
    const at = new Map(
      [...this.rows].map(([name, row]) => {
        const box = row.querySelector("h2").getBoundingClientRect();
        return [name, box.top + box.height / 2 - top];
      }),
    );
    const width = this.graph.clientWidth < 560 ? NARROW : GUTTER;
    const height = this.list.clientHeight;
    const edge = width - 10;
    this.arcs.setAttribute("width", width);
    this.arcs.setAttribute("height", height);
    const reach = (distance) => Math.min(edge - 4, 10 + (edge - 14) * Math.sqrt(distance / height));
    this.arcs.replaceChildren(
      ...this.models.flatMap(({ name, parents }) =>
        parents.map((parent) => {
          const [y0, y1] = [at.get(parent), at.get(name)];
          const x = edge - 1.33 * reach(y1 - y0);
          return s("path", {
            d: `M${edge} ${y0}C${x} ${y0} ${x} ${y1} ${edge} ${y1}`,
            "data-parent": parent,
            "data-child": name,
          });
        }),
      ),
      ...this.models.map(({ name }) => s("circle", { cx: edge, cy: at.get(name), r: 4.5 })),
    );
  }
}
