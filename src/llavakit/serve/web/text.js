// A model's words as nodes. They are text, whatever they spell: a few marks (code, bold) become elements, everything else stays as it is.

import { make } from "./dom.js";

const LONGEST = 60_000; // characters that are looked through for marks; longer replies are shown as they are
const INLINE = /(`[^`\n]+`)|(\*\*[^*\n]+\*\*)/g;

export function formatted(words) {
  const whole = document.createDocumentFragment();
  if (words.length > LONGEST) {
    whole.append(make("p", {}, words));
    return whole;
  }
  // Odd parts are fenced code; a fence that is still open reaches to the end.
  words.split(/^```[^\n]*\n?/m).forEach((part, at) => {
    if (at % 2) whole.append(make("pre", { tabindex: "0" }, make("code", {}, part.replace(/\n$/, ""))));
    else for (const block of part.split(/\n{2,}/)) if (block.trim()) whole.append(make("p", {}, ...inline(block.replace(/^\n+|\s+$/g, ""))));
  });
  return whole;
}

function* inline(words) {
  let from = 0;
  for (const found of words.matchAll(INLINE)) {
    if (found.index > from) yield words.slice(from, found.index);
    yield found[1] ? make("code", {}, found[1].slice(1, -1)) : make("strong", {}, found[2].slice(2, -2));
    from = found.index + found[0].length;
  }
  if (from < words.length) yield words.slice(from);
}
