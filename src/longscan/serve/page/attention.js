// The matrices of a layer over a text: the hidden attention of its scan, and its attention.

import { json } from "./api.js";
import { field, h, select } from "./dom.js";
import { decode, HeatMap } from "./maps.js";
import { asked } from "./model.js";
import { number, t } from "./words.js";

export class AttentionCard {
  /** `choose(index)` is called when a row is chosen, `changed(array)` when another matrix is shown. */
  constructor(model, report, choose, changed) {
    Object.assign(this, { report, choose, changed, maps: [], array: null, index: 0, work: null });
    this.names = report.tokens.map((token) => token.text);
    this.holder = h("div", { class: "squares" });
    this.said = h("p", { class: "note", role: "status" });
    this.lane = h("input", {
      type: "number",
      min: 0,
      step: 1,
      placeholder: t("in.mean"),
      inputmode: "numeric",
      onchange: () => this.load(),
    });
    const named = model.layers.map((one) => [
      one.number,
      t("in.layer", one.number, one.scan ? t("in.scan") : "", one.attention ? t("in.attends") : ""),
    ]);
    this.layer = select(named, model.layers.at(-1).number, () => this.load());
    const fits = report.tokens.length <= model.max_attention_tokens;
    this.element = h(
      "section",
      { class: "card" },
      h("h2", { text: t("in.attention") }),
      h("p", { text: t("in.attention.what") }),
      fits
        ? h("div", { class: "grid" }, field(t("layer"), this.layer), field(t("in.lane"), this.lane))
        : h("p", { class: "note", text: t("in.toolong", number(model.max_attention_tokens)) }),
      this.said,
      this.holder,
    );
    if (fits) this.load();
  }

  async load() {
    this.work?.abort();
    const work = new AbortController();
    this.work = work;
    this.said.textContent = t("in.working");
    const tokens = this.report.tokens.map((token) => token.id);
    const body = { ...asked(), tokens, layer: Number(this.layer.value) };
    if (this.lane.value !== "") body.lane = this.lane.valueAsNumber;
    try {
      const { parts } = await json("v1/inspect/attention", body, work.signal);
      this.said.textContent = "";
      this.maps = parts.map((part) => this.map(part, body.lane));
      this.holder.replaceChildren(...this.maps.map((map) => map.element));
      this.array = this.maps.at(-1).array;
      this.mark(this.index);
      this.changed(this.array);
    } catch (error) {
      if (error.name !== "AbortError") this.said.textContent = error.message;
    }
  }

  map({ kind, noun, lanes, matrix }, lane) {
    const name = t(kind === "scan" ? "in.hidden" : "in.softmax");
    const of = lane === undefined ? t("in.over", number(lanes), t(`${noun}s`)) : t("in.one", t(noun), lane);
    return new HeatMap({
      array: decode(matrix),
      label: `${name}, ${of}`,
      rows: this.names,
      columns: this.names,
      axes: [t("in.queries"), t("in.keys")],
      square: true,
      shown: (i, j) => j <= i,
      read: (i, j, value) => t("in.pair", this.names[i], this.names[j], number(value)),
      pick: (i) => this.choose(i),
    });
  }

  /** Mark the row of the token that is chosen in the text. */
  mark(index) {
    this.index = index;
    for (const map of this.maps) map.mark(index);
  }

  close() {
    this.work?.abort();
  }
}
