// What may come after a token, and continuing from there with another one.

import { json } from "./api.js";
import { button, field, h, select } from "./dom.js";
import { asked } from "./model.js";
import { number, t } from "./words.js";

const settings = { n: 2, length: 32, temperature: 0.7 };

export class Next {
  constructor(report, grow) {
    Object.assign(this, { report, grow });
    this.title = h("h2", { text: t("next") });
    this.list = h("ol", { class: "likely" });
    this.found = h("div", { class: "found", "aria-live": "polite" });
    this.element = h(
      "section",
      { class: "card" },
      this.title,
      h("p", { text: t("next.what") }),
      this.list,
      h(
        "div",
        { class: "grid" },
        field(
          t("next.n"),
          select(
            [1, 2, 3, 4].map((n) => [n, n]),
            settings.n,
            (value) => {
              settings.n = Number(value);
            },
          ),
        ),
        field(
          t("next.length"),
          select(
            [8, 16, 32, 64, 128].map((n) => [n, n]),
            settings.length,
            (value) => {
              settings.length = Number(value);
            },
          ),
        ),
        field(
          t("set.temperature"),
          select(
            [0, 0.3, 0.7, 1, 1.5].map((n) => [n, n]),
            settings.temperature,
            (value) => {
              settings.temperature = Number(value);
            },
          ),
        ),
      ),
      this.found,
    );
  }

  /** Show what is likely after a token. */
  show(index) {
    this.index = index;
    const { tokens, next, names } = this.report;
    const follows = tokens[index + 1];
    this.title.textContent = t("next.after", shown(tokens[index].text));
    const rows = next[index].map(([id, share]) => ({ id, share, text: names[id] }));
    if (follows && !rows.some((row) => row.id === follows.id)) {
      rows.push({ id: follows.id, share: Math.exp(follows.logprob), text: follows.text });
    }
    this.list.replaceChildren(
      ...rows.map(({ id, share, text }) => {
        const bar = h("span", { class: "share", "aria-hidden": "true" });
        bar.style.width = `${Math.max(1, 100 * share)}%`;
        const own = follows?.id === id;
        return h(
          "li",
          {},
          h(
            "button",
            {
              type: "button",
              class: own ? "own" : null,
              onclick: () => this.fork(id, text),
              title: t("next.fork"),
            },
            bar,
            h("span", { class: "name", text: shown(text) }),
            h("span", { class: "percent", text: `${number(100 * share, 2)} %` }),
            own ? h("small", { text: t("next.own") }) : null,
          ),
        );
      }),
    );
  }

  /** Continue with a token: the text up to it is prefilled once, and its state forked. */
  async fork(id, text) {
    const tokens = [...this.report.tokens.slice(0, this.index + 1).map((token) => token.id), id];
    const place = this.index + 1;
    const turn = (this.turn = (this.turn ?? 0) + 1); // what comes too late is not shown
    this.found.replaceChildren(h("p", { class: "note", text: t("in.working") }));
    try {
      const { n, length, temperature } = settings;
      const { continuations } = await json("v1/inspect/continue", {
        ...asked(),
        tokens,
        n,
        max_tokens: length,
        temperature,
      });
      if (turn !== this.turn) return;
      this.found.replaceChildren(
        h("p", { class: "note", text: t("next.forked", shown(text), place) }),
        ...continuations.map((one, i) =>
          h(
            "div",
            { class: "continuation" },
            h("p", { class: "plain" }, h("mark", { text: text }), one.text),
            button(t("next.inspect"), () =>
              this.grow(
                [...tokens, ...one.tokens.map((token) => token.id)],
                t("next.name", place, shown(text), i + 1),
              ),
            ),
          ),
        ),
      );
    } catch (error) {
      this.found.replaceChildren(h("p", { class: "alert", role: "alert", text: error.message }));
    }
  }
}

/** Return a token with its spaces visible. */
const shown = (text) => text.replace(/^ /, "␣").replace(/ $/, "␣") || "∅";
