// What a screen reader hears of an answer: whole sentences, not tokens.

import { h } from "./dom.js";

const END = /[.!?…]+["'”’)]*\s|[。！？；]+|\n+/g;
const LEAST = 20; // characters; shorter sentences wait for the next one

/** The log of a conversation, for ears only. */
export class Speech {
  constructor(label) {
    this.element = h("div", { class: "unseen", role: "log", "aria-live": "polite", "aria-label": label });
    this.rest = "";
  }

  /** Say who speaks, or what has happened. */
  say(text) {
    this.element.append(h("p", { text }));
    while (this.element.childElementCount > 40) this.element.firstChild.remove();
  }

  /** Take a part of an answer, and say the sentences that are complete. */
  append(text) {
    this.rest += text;
    let end = 0;
    for (const match of this.rest.matchAll(END)) {
      const after = match.index + match[0].length;
      if (after - end >= LEAST || match[0].includes("\n")) end = after;
    }
    if (end) this.#spoken(this.rest.slice(0, end));
    this.rest = this.rest.slice(end);
  }

  /** Say what is left. */
  flush() {
    this.#spoken(this.rest);
    this.rest = "";
  }

  #spoken(text) {
    const plain = text
      .replace(/[*_`#|>~]+/g, " ")
      .replace(/\s+/g, " ")
      .trim();
    if (plain) this.say(plain);
  }
}
