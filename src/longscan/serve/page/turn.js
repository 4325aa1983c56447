// A message on the page: its text, what it cost, and what can be done with it.

import { button, h } from "./dom.js";
import { Markdown } from "./markdown.js";
import { languageOf, number, t } from "./words.js";

export class Turn {
  constructor(message, actions) {
    Object.assign(this, { message, actions, shown: 0, pending: false });
    this.who = h("h2", { class: "who", text: t(`chat.${message.role}`), tabindex: -1 });
    this.branches = h("span", { class: "branches" });
    this.body = h("div", { class: "body" });
    this.stats = h("p", { class: "stats" });
    this.tools = h("div", { class: "tools small" });
    this.element = h(
      "li",
      { class: `turn ${message.role}` },
      h("header", {}, this.who, this.branches),
      this.body,
      this.stats,
      this.tools,
    );
    this.whole();
  }

  /** Show the whole text anew. */
  whole() {
    this.markdown = null;
    this.body.replaceChildren();
    this.thoughts = null;
    this.shown = 0;
    if (this.message.role === "user") {
      this.body.append(h("p", { class: "plain", dir: "auto", text: this.message.content }));
    } else {
      this.draw();
    }
    const language = languageOf(this.message.content);
    if (language) this.body.setAttribute("lang", language);
  }

  /** Show what was added to the text, with the next frame. */
  append() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      if (this.message.running) this.draw();
    });
  }

  draw() {
    const { reasoning, text } = thought(this.message);
    if (reasoning) {
      if (!this.thoughts) {
        this.thoughts = h("p", { class: "plain" });
        this.body.prepend(
          h(
            "details",
            { class: "thoughts", open: this.message.running },
            h("summary", { text: t("chat.reasoning") }),
            this.thoughts,
          ),
        );
      }
      this.thoughts.textContent = reasoning;
    }
    if (!this.markdown || text.length < this.shown) {
      // a thought was only now seen to be one
      this.markdown?.element.remove();
      this.markdown = new Markdown();
      this.body.append(this.markdown.element);
      this.shown = 0;
    }
    this.markdown.append(text.slice(this.shown));
    this.shown = text.length;
  }

  end() {
    this.whole();
    this.update(false);
  }

  focus() {
    this.who.focus();
  }

  /** Show what can be done now. */
  update(busy) {
    const { message, actions } = this;
    this.element.classList.toggle("running", message.running);
    const siblings = message.parent.children;
    const at = siblings.indexOf(message);
    this.branches.replaceChildren(
      ...(siblings.length < 2
        ? []
        : [
            button("‹", () => actions.choose(siblings[at - 1]), {
              "aria-label": t("chat.previous"),
              disabled: at === 0 || busy,
            }),
            h("span", { text: `${at + 1}/${siblings.length}` }),
            button("›", () => actions.choose(siblings[at + 1]), {
              "aria-label": t("chat.next"),
              disabled: at === siblings.length - 1 || busy,
            }),
          ]),
    );
    this.tools.replaceChildren(
      ...(busy
        ? []
        : [
            message.role === "assistant" ? button(t("chat.retry"), actions.retry) : null,
            button(t("chat.edit"), () => this.edit()),
            message.role === "assistant" ? button(t("chat.fork"), actions.continue) : null,
            navigator.clipboard ? button(t("chat.copy"), (event) => this.copy(event.target)) : null,
          ].filter(Boolean)),
    );
    this.stats.textContent = message.running ? "" : summary(message);
    this.stats.classList.toggle("failed", Boolean(message.error));
  }

  async copy(button_) {
    await navigator.clipboard.writeText(this.message.content);
    button_.textContent = t("chat.copied");
    setTimeout(() => {
      button_.textContent = t("chat.copy");
    }, 1500);
  }

  edit() {
    const input = h("textarea", {
      value: this.message.content,
      rows: Math.min(12, this.message.content.split("\n").length + 1),
      "aria-label": t("chat.edit"),
    });
    const close = () => {
      this.whole();
      this.update(false);
      this.focus();
    };
    const done = () => {
      close();
      if (input.value.trim() && input.value !== this.message.content) this.actions.edit(input.value);
    };
    input.addEventListener("keydown", (event) => {
      if (event.isComposing || event.keyCode === 229) return;
      if (event.key === "Escape") close();
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        done();
      }
    });
    this.body.replaceChildren(input);
    this.tools.replaceChildren(
      button(t("chat.edit.done"), done, { class: "primary" }),
      button(t("chat.cancel"), close),
    );
    input.focus();
  }
}

/** Return what an answer says and what it thinks: in a field of its own, or in tags that may be open still. */
export function thought({ content, reasoning }) {
  if (reasoning) return { reasoning, text: content };
  const end = content.indexOf("</think>");
  const begins = content.trimStart().startsWith("<think>");
  if (end < 0)
    return begins
      ? { reasoning: content.trimStart().slice(7).trim(), text: "" }
      : { reasoning: "", text: content };
  const before = content.slice(0, end).trim();
  return { reasoning: (begins ? before.slice(7) : before).trim(), text: content.slice(end + 8).trimStart() };
}

function summary({ stats, error }) {
  if (error) return error;
  if (!stats) return "";
  if (stats.stopped) return t("chat.stopped");
  const parts = [t("chat.cached", number(stats.fresh), number(stats.remembered))];
  if (stats.speed) parts.push(t("chat.speed", number(stats.speed)));
  if (stats.wait !== null) parts.push(t("chat.first", number(stats.wait, 2)));
  if (stats.cut) parts.push(t("chat.cut"));
  return parts.join(" · ");
}
