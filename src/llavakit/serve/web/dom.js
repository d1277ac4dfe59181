// A few lines over the DOM. Text goes in as text nodes and nothing here ever parses HTML.

export const $ = (id) => document.getElementById(id);

// make("p.note", {title: "..."}, "words", child, ...): an element; props that are functions become listeners.
export function make(kind, props = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

// A quiet button with an icon; `label` is what screen readers and the tooltip say.
export function doing(name, label, click, props = {}) {
  return make("button.doing", { type: "button", "aria-label": label, title: label, click, ...props }, icon(name));
}

export const number = (value) => value.toLocaleString("en-US");

// What a screen reader says next, once it has finished what it is saying.
export function announce(words) {
  const node = $("announce");
  node.textContent = node.textContent === words ? `${words} ` : words;
}

export async function copy(words) {
  try {
    await navigator.clipboard.writeText(words);
  } catch { // not on https or localhost
    const area = make("textarea.unseen");
    area.value = words;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}
