// What the model does inside, token by token: its steps, its state, its hidden attention, its next tokens.

import { json } from "./api.js";
import { AttentionCard } from "./attention.js";
import { messages } from "./chat.js";
import { Chart } from "./chart.js";
import { button, field, h, tableOf } from "./dom.js";
import { decode, HeatMap } from "./maps.js";
import { asked, model } from "./model.js";
import { Next } from "./next.js";
import { TokenText } from "./tokens.js";
import { bytes, number, t } from "./words.js";

const EXAMPLE =
  'It was a bright morning, and the Captain, who had slept badly, went on deck.\n\n"Where is the King?" he asked. "The King is dead," said the boy, "and the Queen is gone to the Captain."';

// it stays while other views are shown
const kept = { text: EXAMPLE, model: null, branches: [], branch: null };

/** Show the view in an element. */
export function mount(root) {
  const view = new View(root);
  return () => view.close();
}

class View {
  constructor(root) {
    this.work = null;
    this.charts = [];
    this.input = h("textarea", {
      rows: 4,
      id: "text",
      value: kept.text,
      oninput: () => {
        kept.text = this.input.value;
      },
    });
    this.alert = h("p", { class: "alert", role: "alert" });
    this.facts = h("p", { class: "note" });
    this.status = h("p", { class: "note", role: "status" });
    this.cut = h("p", { class: "note" });
    this.branches = h("div", { class: "tools branched", role: "group", "aria-label": t("in.branches") });
    this.result = h("div", { class: "result" });
    const talk = messages();
    root.append(
      h(
        "section",
        { "aria-label": t("nav.inside") },
        h("h1", { text: t("nav.inside") }),
        h("p", { class: "lead", text: t("in.lead") }),
        this.facts,
        field(t("in.text"), this.input),
        h(
          "div",
          { class: "tools spaced" },
          button(t("in.go"), () => this.begin({ text: this.input.value }), { class: "primary" }),
          talk.length ? button(t("in.chat"), () => this.begin({ messages: talk })) : null,
          this.status,
        ),
        this.alert,
        this.cut,
        this.branches,
        this.result,
      ),
    );
    this.describe();
  }

  async describe() {
    try {
      this.model = await model();
      const scans = this.model.layers.filter((layer) => layer.scan).length;
      const attends = this.model.layers.filter((layer) => layer.attention).length;
      const { model: name, class: kind, n_layers: n } = this.model;
      this.facts.textContent = t("in.model", name, kind, number(n), number(scans), number(attends));
    } catch (error) {
      this.alert.textContent = error.message;
      return;
    }
    if (this.closed) return;
    if (kept.model !== this.model.model) {
      // another model sees another text in its own way
      Object.assign(kept, { model: this.model.model, branches: [], branch: null });
    }
    if (kept.branch) this.show(kept.branch);
    else this.begin({ text: kept.text });
  }

  /** Inspect a text of its own, beside which branches may grow. */
  async begin(body) {
    const report = await this.inspect(body);
    if (!report) return;
    kept.branches = [];
    this.add(report, t("in.original"));
  }

  /** Inspect tokens that continue another text. */
  async grow(tokens, name) {
    const report = await this.inspect({ tokens });
    if (report) this.add(report, name);
  }

  async inspect(body) {
    this.work?.abort();
    const work = new AbortController();
    this.work = work;
    this.alert.textContent = "";
    this.status.textContent = t("in.working");
    try {
      const bounded = await this.bounded(body, work.signal);
      return await json("v1/inspect", { ...asked(), ...bounded }, work.signal);
    } catch (error) {
      if (error.name !== "AbortError") this.alert.textContent = error.message;
      return null;
    } finally {
      if (this.work === work) this.status.textContent = "";
    }
  }

  /** Return what to inspect, or the first tokens of it if there are too many. */
  async bounded(body, signal) {
    this.cut.textContent = "";
    if (body.tokens) return { tokens: body.tokens.slice(0, this.model.max_tokens) };
    const whole = body.messages
      ? { messages: body.messages, add_generation_prompt: false }
      : { prompt: body.text };
    const { tokens, count } = await json("tokenize", { ...asked(), ...whole }, signal);
    if (count <= this.model.max_tokens) return body;
    this.cut.textContent = t("in.beginning", number(this.model.max_tokens), number(count));
    return { tokens: tokens.slice(0, this.model.max_tokens) };
  }

  add(report, name) {
    const branch = {
      report,
      name,
      dt: report.dt && decode(report.dt),
      norms: report.norms && decode(report.norms),
    };
    kept.branches.push(branch);
    this.show(branch);
  }

  show(branch) {
    this.release();
    this.charts = [];
    kept.branch = branch;
    this.branches.replaceChildren(
      ...(kept.branches.length < 2
        ? []
        : kept.branches.map((one) =>
            button(one.name, () => this.show(one), { "aria-pressed": one === branch }),
          )),
    );
    const { report } = branch;
    this.maps = [];
    this.names = report.tokens.map((token) => token.text);
    this.next = new Next(report, (tokens, name) => this.grow(tokens, name));
    this.text = new TokenText(report, this.measures(branch), (index) => this.choose(index));
    this.matrices = this.model.layers.length
      ? new AttentionCard(
          this.model,
          report,
          (index) => this.text.choose(index),
          (array) => this.text.attention(array, this.text.index),
        )
      : null;
    this.result.replaceChildren(
      h(
        "div",
        {},
        h("div", { class: "pair" }, this.text.element, this.next.element),
        report.layers.length
          ? h("div", {}, this.steps(branch), this.norms(branch), this.halfLives(branch))
          : h("p", { class: "card", text: t("in.none", this.model.class) }),
        this.partly(report),
        this.matrices?.element,
      ),
    );
    this.text.choose(report.tokens.length - 1);
  }

  choose(index) {
    for (const map of this.maps) map.mark(index);
    this.next.show(index);
    this.matrices?.mark(index);
    if (this.matrices?.array) this.text.attention(this.matrices.array, index);
  }

  /** What colours the text: a name, and a value of each token or null. */
  measures({ report, dt, norms }) {
    const n = report.tokens.length;
    const mean = ({ values }) =>
      Array.from(
        { length: n },
        (_, j) => report.layers.reduce((sum, _, i) => sum + values[i * n + j], 0) / report.layers.length,
      );
    return [
      ...(dt ? [["dt", t("in.by.dt"), mean(dt)]] : []),
      [
        "surprise",
        t("in.by.surprise"),
        report.tokens.map(({ logprob }) => (logprob === null ? null : -logprob / Math.LN2)),
      ],
      ...(norms ? [["norm", t("in.by.norm"), mean(norms)]] : []),
      ...(dt
        ? report.layers.map((number_, i) => [
            `dt${i}`,
            t("in.by.layer", number_),
            Array.from(dt.values.slice(i * n, (i + 1) * n)),
          ])
        : []),
    ];
  }

  map(array, label, symbol, { layers }) {
    const map = new HeatMap({
      array,
      label,
      rows: layers.map(String),
      columns: this.names,
      axes: [t("layer"), t("in.tokens")],
      read: (i, j, value) => t("in.cell", layers[i], j + 1, this.names[j], symbol, number(value)),
      pick: (_, j) => this.text.choose(j),
    });
    this.maps.push(map);
    return map.element;
  }

  steps({ report, dt }) {
    const nouns = [
      ...new Set(this.model.layers.filter((one) => one.scan).map((one) => t(`${one.scan.noun}s`))),
    ].join(", ");
    return h(
      "section",
      { class: "card" },
      h("h2", { text: t("in.dt") }),
      h("p", { text: t("in.dt.what") }),
      this.map(dt, t("in.dt.label", nouns), "Δ", report),
    );
  }

  norms({ report, norms }) {
    return h(
      "section",
      { class: "card" },
      h("h2", { text: t("in.norm") }),
      h("p", { text: t("in.norm.what", bytes(this.model.state_bytes)) }),
      this.map(norms, t("in.norm.label"), "‖h‖", report),
    );
  }

  halfLives({ report }) {
    const rows = report.half_lives.map((row) => row.map((value) => value ?? Infinity));
    const most = Math.max(10, ...rows.flat().filter(Number.isFinite)) * 1.3;
    const middle = rows.map((row, i) => [report.layers[i], Math.min(row[1], most)]);
    const text = rows.map((row, i) => t("in.half.row", report.layers[i], number(row[1]))).join("; ");
    const chart = new Chart({
      label: t("in.half.label", text),
      x: {
        label: t("layer"),
        least: Math.min(...report.layers) - 0.5,
        most: Math.max(...report.layers) + 0.5,
        ticks: report.layers.filter((_, i) => i % Math.ceil(report.layers.length / 16) === 0),
      },
      y: { label: t("in.half.axis"), log: true, least: 1, most },
      height: 240,
    });
    this.charts.push(chart);
    chart.show([
      {
        class: "first",
        points: middle,
        dots: "only",
        bars: rows.map((row, i) => [report.layers[i], Math.max(row[0], 1), Math.min(row[2], most)]),
      },
    ]);
    return h(
      "section",
      { class: "card" },
      h("h2", { text: t("in.half") }),
      h("p", { text: t("in.half.what") }),
      chart.element,
      tableOf(t("table"), t("in.half"), () => [
        [t("layer"), "25 %", t("median"), "75 %"],
        ...rows.map((row, i) => [String(report.layers[i]), ...row.map((value) => number(value))]),
      ]),
    );
  }

  /** Say which layers have no Δ. */
  partly(report) {
    const without = this.model.layers.filter((one) => !one.scan).map((one) => one.number);
    return without.length && report.layers.length
      ? h("p", { class: "note", text: t("in.partly", without.join(", ")) })
      : null;
  }

  /** Let go of what draws or waits for the branch that is shown. */
  release() {
    for (const chart of this.charts) chart.close();
    this.matrices?.close();
  }

  close() {
    this.closed = true;
    this.work?.abort();
    this.release();
  }
}
