// Markdown as DOM nodes. What a model writes is hostile: no markup is parsed, no image loaded, and a link says
// where it goes. Every scan is linear in the length of the text.

import { h } from "./dom.js";
import { inline } from "./inline.js";

const DEPTH = 6; // of nested quotes and lists
const COLUMNS = 32; // of a table

/** An element that shows growing markdown: only what may still change is rendered again. */
export class Markdown {
  constructor(text = "") {
    this.element = h("div", { class: "prose" });
    this.open = ""; // the text that may change what it is
    this.last = []; // its nodes
    if (text) this.append(text);
  }

  append(text) {
    this.open += text;
    const parsed = blocks(this.open);
    let done = Math.max(0, parsed.length - 1); // what stands behind a blank line has no part in what is before
    while (done > 0 && (!parsed[done].apart || parsed[done - 1].kind === "list")) done -= 1;
    for (const node of this.last) node.remove();
    for (const block of parsed.slice(0, done)) this.element.append(render(block, 0));
    this.open = this.open.slice(parsed[done]?.begin ?? 0);
    this.last = parsed.slice(done).map((block) => render(block, 0));
    for (const node of this.last) this.element.append(node);
  }
}

/** Return the text of markdown as one fragment. */
export function markdown(text, depth = 0) {
  const fragment = document.createDocumentFragment();
  for (const block of blocks(text)) fragment.append(render(block, depth));
  return fragment;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:([ \t]+)(?=\S)|[ \t]*$)/;
const QUOTE = /^ {0,3}> ?/;
const DELIMITER = /^ {0,3}\|?(?:[ \t]*:?-+:?[ \t]*\|)+(?:[ \t]*:?-+:?[ \t]*)?$/;

/** Return the blocks of a text: kind, lines, where each begins, and whether behind a blank line. */
function blocks(text) {
  const found = [];
  const lines = text.split("\n");
  let at = 0;
  let i = 0;
  const take = () => {
    at += lines[i].length + 1;
    return lines[i++];
  };
  while (i < lines.length) {
    const line = lines[i];
    const begin = at;
    const fence = fenced(line);
    const item = ITEM.exec(line);
    if (!line.trim()) {
      take();
      continue;
    }
    const block = { begin, lines: [], apart: i > 0 && !lines[i - 1].trim() };
    if (fence) {
      Object.assign(block, { kind: "code", language: take().slice(fence[0].length).trim().split(/\s/)[0] });
      while (i < lines.length && !closes(lines[i], fence[1])) block.lines.push(take());
      if (i < lines.length) take();
    } else if (HEADING.test(line)) {
      const [marks, { length: level }] = HEADING.exec(line);
      Object.assign(block, { kind: "heading", level, lines: [take().slice(marks.length).trim()] });
    } else if (RULE.test(line)) {
      take();
      block.kind = "rule";
    } else if (QUOTE.test(line)) {
      block.kind = "quote";
      while (i < lines.length && QUOTE.test(lines[i])) block.lines.push(take().replace(QUOTE, ""));
    } else if (item) {
      const ordered = /\d/.test(item[2]);
      Object.assign(block, { kind: "list", ordered, start: parseInt(item[2], 10), items: [] });
      const same = (text) => {
        const next = ITEM.exec(text);
        return next && !RULE.test(text) && /\d/.test(next[2]) === ordered ? next : null;
      };
      for (let next = item; next; next = i < lines.length ? same(lines[i]) : null) {
        const width = Math.min(next[0].length, next[1].length + next[2].length + 4) || 2;
        const own = [take().slice(next[0].length)];
        while (
          i < lines.length &&
          (!lines[i].trim()
            ? indented(lines[i + 1], 2)
            : indented(lines[i], 2) || (!ITEM.test(lines[i]) && !starts(lines[i]) && own.at(-1).trim()))
        ) {
          const more = take();
          own.push(more.slice(Math.min(width, more.length - more.trimStart().length)));
        }
        block.items.push(own.join("\n"));
        if (i < lines.length && !lines[i].trim() && same(lines[i + 1] ?? "")) take();
      }
    } else if (tabular(line, lines[i + 1])) {
      Object.assign(block, { kind: "table", head: cells(take()), align: cells(take()), rows: [] });
      while (i < lines.length && lines[i].includes("|") && lines[i].trim()) block.rows.push(cells(take()));
    } else {
      block.kind = "paragraph";
      do block.lines.push(take());
      while (
        i < lines.length &&
        lines[i].trim() &&
        !starts(lines[i]) &&
        !/^ {0,3}(?:[-*+]|1[.)])[ \t]+\S/.test(lines[i]) &&
        !tabular(lines[i], lines[i + 1])
      );
    }
    found.push(block);
  }
  return found;
}

const indented = (line, by) =>
  line !== undefined && line.trim() !== "" && line.length - line.trimStart().length >= by;
const fenced = (line) => {
  // backticks behind backticks are code within a line
  const match = FENCE.exec(line);
  return match && (match[1][0] === "~" || !line.includes("`", match[0].length)) ? match : null;
};
const closes = (line, fence) => {
  // a fence at least as long
  const marks = line.trim();
  return marks.startsWith(fence) && marks === fence[0].repeat(marks.length) && FENCE.test(line);
};
const starts = (line) => fenced(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);

/** Whether a table begins with two lines. */
function tabular(head, rule = "") {
  if (!head.includes("|") || !DELIMITER.test(rule)) return false;
  const n = cells(head).length;
  return n <= COLUMNS && n === cells(rule).length;
}

/** Return the cells of a row; a pipe after a backslash is none. */
function cells(line) {
  const row = line.trim().replace(/^\|/, "");
  const found = [""];
  for (let i = 0; i < row.length; i++) {
    if (row[i] === "\\" && row[i + 1] === "|") found[found.length - 1] += row[++i];
    else if (row[i] !== "|") found[found.length - 1] += row[i];
    else if (i < row.length - 1) found.push("");
  }
  return found.map((cell) => cell.trim());
}

function render(block, depth) {
  const text = block.lines.join("\n");
  switch (block.kind) {
    case "code":
      return h("pre", { tabindex: 0 }, h("code", { text, "data-language": block.language || null }));
    case "heading":
      return h(`h${Math.min(block.level + 2, 6)}`, {}, inline(text));
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, depth < DEPTH ? markdown(text, depth + 1) : text);
    case "list":
      return h(
        block.ordered ? "ol" : "ul",
        { start: block.ordered && block.start !== 1 ? block.start : null },
        block.items.map((item) => h("li", {}, depth < DEPTH ? tight(markdown(item, depth + 1)) : item)),
      );
    case "table": {
      const row = (tag, given) =>
        h(
          "tr",
          {},
          given.slice(0, block.head.length).map((cell, i) => {
            const rule = block.align[i] ?? "";
            const align = rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "end") : null;
            return h(tag, { class: align, scope: tag === "th" ? "col" : null }, inline(cell));
          }),
        );
      return h(
        "div",
        { class: "scroll", tabindex: 0 },
        h(
          "table",
          {},
          h("thead", {}, row("th", block.head)),
          h(
            "tbody",
            {},
            block.rows.map((given) => row("td", given)),
          ),
        ),
      );
    }
    default:
      return h("p", {}, inline(text));
  }
}

/** Take the paragraph away from around the text of an item that is nothing else. */
function tight(fragment) {
  const [first, ...others] = fragment.children;
  if (first?.tagName === "P" && others.every((one) => one.tagName !== "P"))
    first.replaceWith(...first.childNodes);
  return fragment;
}
