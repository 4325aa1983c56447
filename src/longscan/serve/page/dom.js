// Elements, made without parsing any markup.

/**
 * Return an element. Attributes beginning with "on" are listeners, `text` is its text, true and false set and
 * leave out an attribute.
 */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name === "value") element.value = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

/** Return a button. */
export function button(text, onclick, attributes = {}) {
  return h("button", { type: "button", text, onclick, ...attributes });
}

/** Return a labelled control: the label, then the control. */
export function field(label, control, hint) {
  return h(
    "label",
    { class: "field" },
    h("span", { text: label }),
    control,
    hint ? h("small", { text: hint }) : null,
  );
}

/** Return a <select> of [value, text] pairs. */
export function select(options, value, onchange, attributes = {}) {
  const element = h(
    "select",
    attributes,
    options.map(([key, text]) => h("option", { value: key, text })),
  );
  element.value = String(value);
  element.addEventListener("change", () => onchange(element.value));
  return element;
}

/** Return a table of something, made when it is opened: `rows` returns its rows, the first of them the header. */
export function tableOf(summary, of, rows) {
  const details = h("details", { class: "table" }, h("summary", { text: summary }));
  details.addEventListener("toggle", () => {
    if (!details.open || details.childElementCount > 1) return;
    const [head, ...body] = rows();
    details.append(
      h(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": `${of} (${summary})` },
        h(
          "table",
          {},
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              head.map((text) => h("th", { scope: "col", text })),
            ),
          ),
          h(
            "tbody",
            {},
            body.map((row) =>
              h(
                "tr",
                {},
                row.map((text, i) => (i ? h("td", { text }) : h("th", { scope: "row", text }))),
              ),
            ),
          ),
        ),
      ),
    );
  });
  return details;
}

/** Offer a text as a file to save. */
export function save(name, text, type = "application/json") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** Whether the reader prefers that nothing moves. */
export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
