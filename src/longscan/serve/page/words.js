// The languages of the page.

import { en } from "./en.js";
import { zh } from "./zh.js";

const WORDS = { en, zh };
const STORE = "longscan.language";
const TAGS = { en: "en", zh: "zh-CN" };

let language =
  localStorage.getItem(STORE) ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
if (!(language in WORDS)) language = "en";

/** The language that is shown. */
export const current = () => language;

/** Its tag, for `lang` and for numbers. */
export const tag = () => TAGS[language];

/** Show another language from now on. */
export function speak(name) {
  language = name;
  localStorage.setItem(STORE, name);
}

/** Return a text of the page; some take numbers or names. */
export function t(name, ...values) {
  const found = WORDS[language][name] ?? WORDS.en[name];
  if (found === undefined) throw new Error(`no text ${name}`);
  return typeof found === "function" ? found(...values) : found;
}

/** Return a number as it is written: 12,114 or 0.093. */
export function number(value, digits = 3) {
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "–";
  const options =
    Math.abs(value) >= 100 || Number.isInteger(value)
      ? { maximumFractionDigits: 0 }
      : { maximumSignificantDigits: digits };
  return value.toLocaleString(tag(), options);
}

/** Return a round number for an axis: 100K, or 10万. */
export const short = (value) =>
  value.toLocaleString(tag(), { notation: "compact", maximumSignificantDigits: 3 });

/** Return bytes with their unit. */
export function bytes(value) {
  let n = value;
  let unit = "B";
  for (const next of ["kB", "MB", "GB", "TB"]) {
    if (n < 999.5) break;
    n /= 1000;
    unit = next;
  }
  return `${number(Number(n.toPrecision(3)))}\u202f${unit}`;
}

/** Return whether a text is mostly Chinese, for its `lang`. */
export function languageOf(text) {
  const han = (text.match(/[\u3400-\u9fff]/g) ?? []).length;
  return han * 3 > text.replace(/\s/g, "").length ? "zh-CN" : null;
}
