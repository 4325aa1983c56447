// The chat: what is asked, what is answered, and its branches.

import { events } from "./api.js";
import { Conversation } from "./conversation.js";
import { button, h, save } from "./dom.js";
import { Turn } from "./turn.js";
import { asked, model } from "./model.js";
import { form, keep, sampling, settings } from "./settings.js";
import { Speech } from "./speech.js";
import { number, t } from "./words.js";

// they live on while other views are shown
let conversation = Conversation.stored();
let running = null; // { message, controller }
let view = null;
let draft = "";

/** The conversation, for the view that looks inside the model. */
export const messages = () => conversation.messages(settings.system);

/** Show the chat in an element. */
export function mount(root) {
  view = new View(root);
  return () => {
    draft = view.input.value;
    view = null;
  };
}

/** Numbers of answers, for the view of memory: tokens held, seconds, speed. */
export const turns = () => conversation.path.filter((one) => one.stats).map((one) => one.stats);

/** Ask for an answer to what the path ends with. */
async function answer(parent = conversation.end) {
  if (running) return;
  const given = conversation.messages(settings.system, parent);
  const message = conversation.add("assistant", "", parent);
  const controller = new AbortController();
  running = { message, controller };
  message.running = true;
  view?.show();
  view?.focus();
  view?.speech.say(t("chat.answering"));
  const watch = { begin: performance.now(), first: 0, last: 0 };
  try {
    await read(message, given, controller.signal, watch);
  } catch (error) {
    if (error.name !== "AbortError") message.error = error.message;
    else if (message.stats === null) message.stats = { stopped: true };
  } finally {
    message.running = false;
    running = null;
    conversation.store();
    view?.ended(message);
  }
}

async function read(message, given, signal, watch) {
  const body = {
    ...asked(),
    messages: given,
    stream: true,
    stream_options: { include_usage: true },
    ...sampling(),
  };
  for await (const chunk of events("v1/chat/completions", body, signal)) {
    const choice = chunk.choices[0];
    const { content = "", reasoning_content: reasoning = "" } = choice?.delta ?? {};
    if (content || reasoning) {
      watch.last = performance.now();
      watch.first ||= watch.last;
      message.content += content ?? "";
      message.reasoning += reasoning ?? "";
      view?.more(message, content ?? "");
    }
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    if (chunk.usage) {
      const {
        prompt_tokens: prompt,
        completion_tokens: written,
        prompt_tokens_details: details,
      } = chunk.usage;
      const seconds = (watch.last - watch.first) / 1000;
      message.stats = {
        remembered: details?.cached_tokens ?? 0,
        fresh: prompt - (details?.cached_tokens ?? 0),
        written,
        total: prompt + written,
        wait: watch.first ? (watch.first - watch.begin) / 1000 : null,
        speed: seconds > 0 && written > 1 ? (written - 1) / seconds : null,
        cut: message.finish === "length",
      };
    }
  }
}

class View {
  constructor(root) {
    this.turns = new Map(); // message -> Turn
    this.list = h("ol", { class: "turns", "aria-label": t("chat.log") });
    this.speech = new Speech(t("chat.spoken"));
    this.note = h("p", { class: "note" });
    this.empty = h(
      "div",
      { class: "empty" },
      h("p", { class: "lead", text: t("chat.empty") }),
      h("p", { text: t("chat.empty.more") }),
    );
    this.input = h("textarea", {
      rows: 1,
      id: "message",
      "aria-label": t("chat.message"),
      placeholder: t("chat.message"),
      value: draft,
    });
    this.send = button(t("chat.send"), () => this.submit(), { class: "primary" });
    this.stop = button(t("chat.stop"), () => running?.controller.abort(), { class: "primary stop" });
    this.alert = h("p", { class: "alert", role: "alert" });
    this.input.addEventListener("keydown", (event) => this.key(event));
    this.input.addEventListener("input", () => this.fit());
    const file = h("input", {
      type: "file",
      accept: ".json,application/json",
      hidden: true,
      onchange: () => this.load(file),
    });
    this.hint = h("p", { class: "hint", text: t("chat.keys") });
    root.append(
      h(
        "section",
        { class: "chat", "aria-label": t("nav.chat") },
        h("h1", { class: "unseen", text: t("nav.chat") }),
        h(
          "div",
          { class: "bar" },
          this.note,
          h(
            "div",
            { class: "tools" },
            button(t("chat.new"), () => this.replace(new Conversation())),
            button(t("chat.export"), () => save("conversation.json", conversation.export(settings.system))),
            button(t("chat.import"), () => file.click()),
            file,
            h("a", { href: "#inside", class: "button", text: t("chat.inside") }),
          ),
        ),
        this.empty,
        this.list,
        this.speech.element,
        h(
          "div",
          { class: "composer" },
          this.alert,
          h(
            "form",
            { class: "ask", onsubmit: (event) => event.preventDefault() },
            this.input,
            this.send,
            this.stop,
          ),
          this.hint,
          h("details", { class: "options" }, h("summary", { text: t("chat.settings") }), form()),
        ),
      ),
    );
    this.describe();
    this.show();
    this.fit();
    window.scrollTo(0, document.body.scrollHeight);
  }

  async describe() {
    try {
      const { model: name, template } = await model();
      this.note.textContent = template.own ? t("chat.template", name) : t("chat.plain", name, template.name);
    } catch (error) {
      this.alert.textContent = error.message;
    }
  }

  /** Show the path; turns that were shown stay as they are. */
  show() {
    const path = conversation.path;
    const shown = path.map((message) => {
      if (!this.turns.has(message)) this.turns.set(message, new Turn(message, this.actions(message)));
      const turn = this.turns.get(message);
      turn.update(Boolean(running));
      return turn.element;
    });
    if (
      shown.length !== this.list.childElementCount ||
      shown.some((one, i) => one !== this.list.children[i])
    ) {
      this.list.replaceChildren(...shown);
    }
    this.empty.hidden = path.length > 0;
    this.send.hidden = Boolean(running);
    this.stop.hidden = !running;
    this.hint.textContent = conversation.leaf ? t("chat.forked") : t("chat.keys");
  }

  actions(message) {
    return {
      retry: () => answer(message.parent),
      continue: () => {
        conversation.fork(message);
        this.show();
        this.input.focus();
      },
      edit: (text) => {
        if (running) return;
        if (message.role === "user") {
          answer(conversation.add("user", text, message.parent));
        } else {
          // an answer put into the model's mouth
          conversation.add("assistant", text, message.parent);
          conversation.store();
          this.show();
        }
      },
      choose: (other) => {
        conversation.choose(other);
        conversation.store();
        this.show();
        this.turns.get(other)?.focus();
      },
    };
  }

  submit() {
    const text = this.input.value;
    if (running || !text.trim()) return;
    this.input.value = "";
    this.alert.textContent = "";
    this.fit();
    conversation.add("user", text);
    answer();
    this.scroll(true);
  }

  key(event) {
    const composing = event.isComposing || event.keyCode === 229; // Enter chooses a character there
    if (event.key === "Enter" && !event.shiftKey && !composing) {
      event.preventDefault();
      this.submit();
    } else if (event.key === "Escape" && running) {
      running.controller.abort();
    }
  }

  /** Give the field the height of its text. */
  fit() {
    this.input.style.height = "auto";
    this.input.style.height = `${Math.min(this.input.scrollHeight + 2, window.innerHeight / 3)}px`;
  }

  more(message, text) {
    const near = this.near();
    this.turns.get(message)?.append();
    this.speech.append(text);
    if (near) this.scroll();
  }

  ended(message) {
    const near = this.near();
    this.speech.flush();
    this.turns.get(message)?.end();
    if (message.error) this.speech.say(message.error);
    this.show();
    this.focus();
    if (near) this.scroll();
  }

  /** Give the focus to what comes next, if the button that had it is gone. */
  focus() {
    if (document.activeElement !== document.body) return;
    (running ? this.stop : this.input).focus({ preventScroll: true });
  }

  /** Whether the end of the conversation is in sight: then it stays there. */
  near() {
    return window.innerHeight + window.scrollY > document.body.scrollHeight - 120;
  }

  scroll(always = false) {
    if (always || this.near() || running) window.scrollTo(0, document.body.scrollHeight);
  }

  replace(next) {
    running?.controller.abort();
    conversation = next;
    this.turns.clear();
    conversation.store();
    this.show();
    this.input.focus();
  }

  async load(file) {
    const [chosen] = file.files;
    file.value = "";
    if (!chosen) return;
    try {
      if (chosen.size > 4 << 20) throw new TypeError("size");
      const { conversation: next, system } = Conversation.import(await chosen.text());
      settings.system = system;
      keep();
      document.getElementById("system").value = system;
      this.alert.textContent = "";
      this.replace(next);
      this.speech.say(t("chat.imported", number(next.path.length)));
    } catch {
      this.alert.textContent = t("chat.import.failed", chosen.name);
    }
  }
}
