// The settings of sampling, and what of them a request carries.

import { field, h } from "./dom.js";
import { t } from "./words.js";

// name, default, least, most, step; what is at its default is not sent
const NUMBERS = [
  ["temperature", 0.7, 0, 2, 0.05],
  ["top_p", 0.95, 0.05, 1, 0.01],
  ["top_k", 0, 0, 1000, 1],
  ["min_p", 0, 0, 0.9, 0.01],
  ["repetition_penalty", 1.1, 0.5, 2, 0.01],
  ["max_tokens", 400, 1, 32768, 1],
  ["seed", "", 0, 2 ** 52, 1],
];
const STORE = "longscan.settings";

/** The settings of this browser; the system prompt belongs to the tab. */
export const settings = {
  system: sessionStorage.getItem("longscan.system") ?? "",
  ...defaults(),
  ...stored(),
};

function defaults() {
  return Object.fromEntries(NUMBERS.map(([name, value]) => [name, value]));
}

function stored() {
  try {
    const given = JSON.parse(localStorage.getItem(STORE)) ?? {};
    return Object.fromEntries(
      NUMBERS.filter(([name]) => typeof given[name] === "number").map(([name]) => [name, given[name]]),
    );
  } catch {
    return {};
  }
}

/** Remember the settings. */
export function keep() {
  sessionStorage.setItem("longscan.system", settings.system);
  const { system, ...numbers } = settings;
  localStorage.setItem(STORE, JSON.stringify(numbers));
}

/** Return the fields of a request. */
export function sampling() {
  const fields = {};
  for (const [name] of NUMBERS) if (settings[name] !== "") fields[name] = settings[name];
  return fields;
}

/** Return the form of the settings. */
export function form(changed = () => {}) {
  const system = h("textarea", {
    rows: 3,
    id: "system",
    value: settings.system,
    placeholder: t("chat.system.none"),
  });
  system.addEventListener("input", () => {
    settings.system = system.value;
    keep();
    changed();
  });
  const numbers = NUMBERS.map(([name, , least, most, step]) => {
    const input = h("input", {
      type: "number",
      min: least,
      max: most,
      step,
      value: settings[name],
      inputmode: "decimal",
      placeholder: name === "seed" ? t("chat.seed.random") : null,
    });
    input.addEventListener("change", () => {
      const value = input.valueAsNumber;
      const whole = step === 1 ? Math.round(value) : value;
      settings[name] = Number.isFinite(value) ? Math.min(most, Math.max(least, whole)) : defaults()[name];
      input.value = settings[name];
      keep();
    });
    return field(t(`set.${name}`), input);
  });
  return h(
    "div",
    { class: "settings" },
    field(t("chat.system"), system),
    h("div", { class: "grid" }, numbers),
  );
}
