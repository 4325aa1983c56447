// What a conversation costs as it grows: bytes and speed, beside a Transformer of equal size.

import { events } from "./api.js";
import { turns } from "./chat.js";
import { Chart } from "./chart.js";
import { button, field, h, select, tableOf } from "./dom.js";
import { asked, model } from "./model.js";
import { bytes, number, short, t } from "./words.js";

const LENGTHS = [10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6];
const WINDOW = 40; // tokens over which a speed is averaged, at least
const SECONDS = 0.15; // likewise: tokens arrive in packets

// they stay while other views are shown
const kept = { width: 2, shared: 1, length: 800, model: null, measured: [] };

/**
 * Return the bytes that each token adds to the KV cache of a Transformer with as many parameters outside of its
 * embeddings, of the same width: a layer has 12 d² of them, and stores a key and a value of d numbers.
 */
export function cachePerToken({ body_parameters: parameters, d_model: d }, width, shared) {
  const layers = parameters / (12 * d * d);
  return (2 * layers * d * width) / shared;
}

/** Show the view in an element. */
export function mount(root) {
  const view = new View(root);
  return () => view.close();
}

class View {
  constructor(root) {
    this.alert = h("p", { class: "alert", role: "alert" });
    this.facts = h("dl", { class: "facts" });
    this.size = new Chart({
      label: "",
      x: { label: t("mem.tokens"), log: true, least: 10, most: 1e6, format: short },
      y: { label: t("mem.bytes"), log: true, format: bytes },
    });
    this.speed = new Chart({
      label: "",
      x: { label: t("mem.tokens"), least: 0 },
      y: { label: t("mem.speed"), least: 0 },
      height: 230,
    });
    this.formula = h("p", { class: "note" });
    this.said = h("p", { class: "note", role: "status" });
    this.go = button(t("mem.measure"), () => this.measure(), { class: "primary" });
    const choose = (name, values) =>
      select(values, kept[name], (value) => {
        kept[name] = Number(value);
        this.draw();
      });
    this.table = h("div");
    root.append(
      h(
        "section",
        { "aria-label": t("nav.memory") },
        h("h1", { text: t("mem.title") }),
        h("p", { class: "lead", text: t("mem.lead") }),
        this.alert,
        this.facts,
        h(
          "div",
          { class: "card" },
          h("h2", { text: t("mem.size") }),
          h(
            "div",
            { class: "grid" },
            field(
              t("mem.width"),
              choose("width", [
                [2, t("mem.bits", 16)],
                [4, t("mem.bits", 32)],
                [1, t("mem.bits", 8)],
              ]),
            ),
            field(
              t("mem.shared"),
              choose("shared", [
                [1, t("mem.own")],
                [4, "4"],
                [8, "8"],
              ]),
            ),
          ),
          this.size.element,
          this.formula,
          this.table,
        ),
        h(
          "div",
          { class: "card" },
          h("h2", { text: t("mem.pace") }),
          h("p", { text: t("mem.pace.what") }),
          h(
            "div",
            { class: "tools" },
            field(
              t("mem.length"),
              choose("length", [
                [200, "200"],
                [800, "800"],
                [2000, number(2000)],
                [8000, number(8000)],
              ]),
            ),
            this.go,
          ),
          this.said,
          this.speed.element,
        ),
      ),
    );
    this.load();
  }

  async load() {
    try {
      this.model = await model();
      if (kept.model !== this.model.model) Object.assign(kept, { model: this.model.model, measured: [] });
      this.draw();
    } catch (error) {
      this.alert.textContent = error.message;
    }
  }

  draw() {
    const {
      model: name,
      state_bytes: fixed,
      state_bytes_per_token: growth,
      d_model: d,
      body_parameters: body,
    } = this.model;
    const per = cachePerToken(this.model, kept.width, kept.shared);
    const state = (n) => fixed + growth * n;
    const even = growth < per ? Math.ceil(fixed / (per - growth)) : Infinity;
    const fact = (term, text) => h("div", {}, h("dt", { text: term }), h("dd", { text }));
    this.facts.replaceChildren(
      fact(t("mem.state"), growth ? `${bytes(fixed)} + ${bytes(growth)} ${t("mem.each")}` : bytes(fixed)),
      fact(t("mem.cache"), `${bytes(per)} ${t("mem.each")}`),
      fact(t("mem.even"), Number.isFinite(even) ? number(even) : "–"),
    );
    this.formula.textContent = t(
      "mem.formula",
      number(body),
      number(d),
      number(body / (12 * d * d)),
      kept.width,
      kept.shared,
      bytes(per),
    );
    const label = t("mem.label", bytes(state(1e4)), bytes(per * 1e4));
    this.size.show(
      [
        { name: t("mem.this", name), class: "first", points: LENGTHS.map((n) => [n, state(n)]) },
        { name: t("mem.that"), class: "second", points: LENGTHS.map((n) => [n, per * n]) },
        ...(turns().some((turn) => turn.total)
          ? [
              {
                name: t("mem.turns"),
                class: "first dots",
                dots: "only",
                points: turns()
                  .filter((turn) => turn.total)
                  .map(({ total }) => [Math.max(10, total), state(total)]),
              },
            ]
          : []),
      ],
      label,
    );
    this.table.replaceChildren(
      tableOf(t("table"), t("mem.size"), () => [
        [t("mem.tokens"), t("mem.this", name), t("mem.that")],
        ...LENGTHS.map((n) => [number(n), bytes(state(n)), bytes(per * n)]),
      ]),
    );
    this.pace();
  }

  pace() {
    const spoken = turns()
      .filter((turn) => turn.speed)
      .map((turn) => [turn.total, turn.speed]);
    const last = kept.measured.at(-1);
    this.speed.element.hidden = !last && !spoken.length;
    this.speed.show(
      [
        { name: t("mem.measured"), class: "first", points: kept.measured },
        ...(spoken.length ? [{ name: t("mem.turns"), class: "third", dots: "only", points: spoken }] : []),
      ],
      last
        ? t("mem.pace.label", number(kept.measured[0][1]), number(last[0]), number(last[1]))
        : t("mem.pace.none"),
    );
  }

  /** Let the model write, and note how fast. */
  async measure() {
    if (this.controller) {
      this.controller.abort();
      return;
    }
    this.controller = new AbortController();
    this.go.textContent = t("chat.stop");
    kept.measured = [];
    const body = {
      ...asked(),
      prompt: "The",
      max_tokens: kept.length,
      ignore_eos: true,
      temperature: 1,
      stream: true,
      logprobs: 0,
    };
    let n = 0;
    let since = null;
    try {
      for await (const chunk of events("v1/completions", body, this.controller.signal)) {
        n += chunk.choices[0]?.logprobs?.tokens.length ?? 0;
        const now = performance.now();
        since ??= { n, now };
        const seconds = (now - since.now) / 1000;
        if (n - since.n >= WINDOW && seconds >= SECONDS) {
          kept.measured.push([n, (n - since.n) / seconds]);
          since = { n, now };
          this.pace();
          this.said.textContent = t("mem.sofar", number(n));
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") this.alert.textContent = error.message;
    } finally {
      this.controller = null;
      this.go.textContent = t("mem.measure");
      if (kept.measured.length) this.said.textContent = this.speed.svg.getAttribute("aria-label");
    }
  }

  close() {
    this.controller?.abort();
    this.size.close();
    this.speed.close();
  }
}
