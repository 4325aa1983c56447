// What stands inside a line of markdown: emphasis, code and links, in one pass over its text.

import { h } from "./dom.js";

const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const MARKS = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };
const NESTED = 48; // marks that may be open; further ones are text
const LETTER = /[\p{L}\p{N}]/u;

/**
 * Return the nodes of a line. What is open is on a stack, which says where in the nodes its mark stands, as
 * text. Closing it replaces everything from there on by one node; what is never closed stays text.
 */
export function inline(text) {
  const nodes = [];
  const stack = []; // { mark, at }
  const counts = new Map(); // mark -> how many of it are on the stack
  const ticks = runs(text);
  let plain = "";
  const push = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    if (node) nodes.push(node);
  };
  const enter = (mark) => {
    if (stack.length >= NESTED) {
      plain += mark;
      return;
    }
    push(mark);
    stack.push({ mark, at: nodes.length - 1 });
    counts.set(mark, (counts.get(mark) ?? 0) + 1);
  };
  const close = (...marks) => {
    // what is above it was never closed
    for (;;) {
      const one = stack.pop();
      counts.set(one.mark, counts.get(one.mark) - 1);
      if (marks.includes(one.mark)) return one;
    }
  };
  const inside = (at) => {
    push();
    return nodes.splice(at).slice(1);
  };
  for (let i = 0; i < text.length;) {
    const char = text[i];
    if (char === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
    } else if (char === "\\" && text[i + 1] === "\n") {
      push(h("br"));
      i += 2;
    } else if (char === "`") {
      const n = ticks.length(i);
      const end = ticks.next(i, n);
      if (end < 0) plain += text.slice(i, i + n);
      else push(h("code", { text: code(text.slice(i + n, end)) }));
      i = end < 0 ? i + n : end + n;
    } else if (char === "[" || (char === "!" && text[i + 1] === "[")) {
      enter(char === "!" ? "![" : "[");
      i += char === "!" ? 2 : 1;
    } else if (char === "]") {
      const opened = counts.get("[") || counts.get("![") ? close("[", "![") : null;
      const target = opened ? destination(text, i + 1) : null;
      if (target) push(link(target.url, inside(opened.at)));
      else plain += "]";
      i = target ? target.end : i + 1;
    } else if (char === "<" || (char === "h" && !LETTER.test(text[i - 1] ?? ""))) {
      const match = automatic(text, i, char === "<");
      if (match) push(link(match.url, [match.url]));
      else plain += char;
      i += match ? match.length : 1;
    } else if (char === "*" || char === "_" || char === "~") {
      const inner = stack.at(-1)?.mark === char && text[i + 2] === char; // of three marks, the one inside
      const mark = text[i + 1] === char && !inner ? char + char : char;
      const before = text[i - 1] ?? " ";
      i += mark.length;
      const after = text[i] ?? " ";
      const word = char === "_" && LETTER.test(before) && LETTER.test(after);
      if (!MARKS[mark] || word) plain += mark;
      else if (!/\s/.test(before) && counts.get(mark)) push(h(MARKS[mark], {}, inside(close(mark).at)));
      else if (!/\s/.test(after)) enter(mark);
      else plain += mark;
    } else if (char === "\n" && text[i - 1] === " " && text[i - 2] === " ") {
      push(h("br"));
      i += 1;
    } else {
      plain += char;
      i += 1;
    }
  }
  push();
  return joined(nodes);
}

/** Return nodes with neighbouring texts as one. */
function joined(nodes) {
  const found = [];
  let texts = [];
  for (const node of nodes) {
    if (typeof node === "string") texts.push(node);
    else {
      if (texts.length) found.push(texts.join(""));
      texts = [];
      found.push(node);
    }
  }
  if (texts.length) found.push(texts.join(""));
  return found;
}

/** Return the runs of backticks of a text: their length, and the next one of the same length. */
function runs(text) {
  const starts = new Map(); // length -> positions, the last first
  const lengths = new Map();
  for (const match of text.matchAll(/`+/g)) {
    lengths.set(match.index, match[0].length);
    if (!starts.has(match[0].length)) starts.set(match[0].length, []);
    starts.get(match[0].length).push(match.index);
  }
  for (const list of starts.values()) list.reverse();
  return {
    length: (at) => lengths.get(at) ?? 1,
    next(at, n) {
      const list = starts.get(n) ?? [];
      while (list.length && list.at(-1) <= at) list.pop();
      return list.at(-1) ?? -1;
    },
  };
}

const code = (text) => {
  const line = text.replaceAll("\n", " ");
  return line.startsWith(" ") && line.endsWith(" ") && line.trim() ? line.slice(1, -1) : line;
};

/** Return what stands in parentheses behind "]": a URL, and where it ends. */
function destination(text, at) {
  if (text[at] !== "(") return null;
  let depth = 0;
  for (let i = at + 1; i < text.length && i < at + 2000; i++) {
    const char = text[i];
    if (char === "(" && ++depth > 2) return null;
    if (char === "\n") return null;
    if (char === ")" && depth-- === 0) {
      const [url, ...title] = text
        .slice(at + 1, i)
        .trim()
        .split(/\s/);
      const titled = !title.length || (/^["']/.test(title.find(Boolean)) && /["']$/.test(title.at(-1)));
      return titled ? { url: url.replace(/^<([^<>]*)>$/, "$1"), end: i + 1 } : null;
    }
  }
  return null;
}

/** Return a URL that stands in the text, with or without angle brackets. */
function automatic(text, at, angle) {
  const pattern = angle
    ? /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y
    : /(https?:\/\/[^\s<>"'`|\\^{}*]{1,2000})/y;
  pattern.lastIndex = at;
  const match = pattern.exec(text);
  if (!match) return null;
  let end = match[1].length;
  while (!angle && PUNCTUATION.includes(match[1][end - 1])) end -= 1;
  const url = match[1].slice(0, end);
  return { url, length: angle ? match[0].length : end };
}

const PUNCTUATION = ".,:;!?)]，。；：！？）】」』、";

/** Return a link, which shows its host; or its text, if it goes nowhere. */
function link(url, nodes) {
  let target;
  try {
    target = new URL(url);
  } catch {
    target = null;
  }
  if (!target || !SCHEMES.has(target.protocol)) return h("span", { class: "dead" }, nodes);
  const host = target.protocol === "mailto:" ? target.pathname : target.host;
  const element = h("a", { href: target.href, target: "_blank", rel: "noopener noreferrer nofollow" }, nodes);
  for (const inner of element.querySelectorAll("a")) inner.replaceWith(...inner.childNodes);
  const shown = element.textContent === url && (target.protocol === "mailto:" || url.split("/")[2] === host);
  return shown ? element : h("span", {}, element, h("small", { class: "host", text: ` (${host})` }));
}
