// The frame of the page: its views, the language, the colours, and the question for a key.

import { setAsk } from "./api.js";
import * as chat from "./chat.js";
import { button, h, select } from "./dom.js";
import * as inside from "./inside.js";
import * as line from "./line.js";
import * as memory from "./memory.js";
import { choose, model } from "./model.js";
import * as playground from "./playground.js";
import { current, speak, t, tag } from "./words.js";

const VIEWS = { chat, inside, memory, hippo: playground, line };
const THEMES = ["auto", "light", "dark"];
const THEME = "longscan.theme";

let leave = () => {};

const chosen = () => (location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "chat");
const theme = () => (THEMES.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "auto");

/** Show a view; it replaces the one before. */
function show(main) {
  leave();
  main.replaceChildren();
  leave = VIEWS[chosen()].mount(main) ?? (() => {});
}

/** Return the choice of the model, which shows if there are several. */
function models(main) {
  const label = h("label", { class: "models", hidden: true }, h("span", { text: t("nav.model") }));
  const fill = ({ model: name, models: names }) => {
    if (names.length < 2) return;
    const change = (value) => {
      choose(value);
      show(main);
    };
    const options = names.map((one) => [one, one]);
    label.append(select(options, name, change, { id: "model" }));
    label.hidden = false;
  };
  model().then(fill, () => {}); // the view shows the error
  return label;
}

/** Draw the page: a view below the navigation. */
function draw(focus = false) {
  document.documentElement.lang = tag();
  document.documentElement.dataset.theme = theme();
  const name = chosen();
  document.title = `${t(`nav.${name}`)} – longscan`;
  const main = h("main", { id: "main", tabindex: -1, class: name });
  document.body.replaceChildren(
    h("a", {
      class: "skip",
      href: "#main",
      text: t("nav.skip"),
      onclick: (event) => {
        event.preventDefault();
        main.focus();
      },
    }),
    h(
      "header",
      { class: "top" },
      h("a", { class: "brand", href: "#chat", text: "longscan" }),
      h(
        "nav",
        { "aria-label": t("nav.views") },
        Object.keys(VIEWS).map((view) =>
          h("a", {
            href: `#${view}`,
            text: t(`nav.${view}`),
            "aria-current": view === name ? "page" : null,
          }),
        ),
      ),
      h(
        "div",
        { class: "switches" },
        models(main),
        button(
          t("nav.language"),
          () => {
            speak(current() === "en" ? "zh" : "en");
            draw();
          },
          { lang: current() === "en" ? "zh-CN" : "en", id: "language" },
        ),
        button(
          t(`theme.${theme()}`),
          (event) => {
            localStorage.setItem(THEME, THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]);
            document.documentElement.dataset.theme = theme();
            event.target.textContent = t(`theme.${theme()}`);
            event.target.setAttribute("aria-label", t("theme.label", t(`theme.${theme()}`)));
          },
          { id: "theme", "aria-label": t("theme.label", t(`theme.${theme()}`)) },
        ),
      ),
    ),
    main,
  );
  show(main);
  if (focus) {
    main.focus({ preventScroll: true });
    if (name !== "chat") window.scrollTo(0, 0);
  }
}

/** Ask for the API key of the server. */
function askKey(again) {
  return new Promise((resolve) => {
    const input = h("input", { type: "password", autocomplete: "off", id: "key", required: true });
    const dialog = h(
      "dialog",
      { class: "key", "aria-labelledby": "key-title" },
      h(
        "form",
        { method: "dialog" },
        h("h2", { id: "key-title", text: t("key.title") }),
        h("p", { text: again ? t("key.wrong") : t("key.why") }),
        h("label", { class: "field" }, h("span", { text: t("key.label") }), input),
        h(
          "div",
          { class: "tools" },
          h("button", { class: "primary", value: "use", text: t("key.use") }),
          button(t("chat.cancel"), () => dialog.close("")),
        ),
      ),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "use" ? input.value.trim() : null);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

setAsk(askKey);
window.addEventListener("hashchange", () => draw(true));
draw();
