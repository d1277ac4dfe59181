// Turns as nodes. Each turn keeps its node; what changes in a turn is drawn again, the others stay as they are.

import { $, copy, doing, icon, make } from "./dom.js";
import * as pictures from "./pictures.js";
import { formatted } from "./text.js";

const nodes = new WeakMap();

export function show(turns, actions) {
  const last = turns.at(-1);
  const wanted = turns.map((turn) => {
    const node = nodes.get(turn) ?? (turn.role === "user" ? asked(turn, actions) : replied(turn, actions));
    nodes.set(turn, node);
    node.classList.toggle("last", turn === last);
    return node;
  });
  $("turns").replaceChildren(...wanted);
  $("welcome").hidden = turns.length > 0;
}

export function refresh(turn, actions) {
  const node = turn.role === "user" ? asked(turn, actions) : replied(turn, actions);
  node.classList.toggle("last", nodes.get(turn)?.classList.contains("last") ?? false);
  nodes.get(turn)?.replaceWith(node);
  nodes.set(turn, node);
}

export const nodeOf = (turn) => nodes.get(turn);

// New words of the reply being written: into one text node, at most once a frame.
export function grow(turn) {
  const node = nodes.get(turn);
  if (node.dataset.due) return;
  node.dataset.due = "1";
  requestAnimationFrame(() => {
    delete node.dataset.due;
    if (turn.state !== "writing") return;
    const follow = nearEnd();
    const words = node.querySelector(".text");
    if (!words.firstChild || words.firstChild.nodeType !== Node.TEXT_NODE) words.replaceChildren("");
    words.firstChild.appendData(turn.text.slice(words.firstChild.length));
    if (follow) toEnd();
  });
}

export const nearEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 120;
export const toEnd = () => ($("scroll").scrollTop = $("scroll").scrollHeight);

function asked(turn, actions) {
  const shown = turn.pictures.map((id, at) => thumb(id, `Picture ${at + 1}`));
  return make("article.turn.asked", {},
    make("h3.unseen", {}, "You asked"),
    make("div.saying", {},
      shown.length ? make("div.thumbs", {}, ...shown) : null,
      turn.text ? make(turn.text.length > 800 ? "p.words.much" : "p.words", { dir: "auto", tabindex: turn.text.length > 800 ? "0" : null }, turn.text) : null),
    make("div.doings", {}, doing("edit", "Change this question", () => edit(turn, actions))));
}

export function thumb(id, label, more = null) {
  const picture = pictures.get(id);
  if (!picture) return make("span.thumb.lost", { title: "This picture is no longer kept; add it again" }, icon("picture"), make("span.unseen", {}, `${label}, no longer kept`));
  const image = make("img", { src: picture.url, alt: `${label}: ${picture.name}` });
  image.addEventListener("error", () => image.replaceWith(make("span.noview", {}, picture.name)));
  const button = make("button.look", { type: "button", title: picture.name, click: () => enlarge(picture) }, image);
  return make("span.thumb", {}, button, more);
}

function enlarge(picture) {
  Object.assign($("large-picture"), { src: picture.url, alt: picture.name });
  $("large").showModal();
}

function edit(turn, actions) {
  if (actions.busy()) return;
  const node = nodes.get(turn);
  let ids = [...turn.pictures];
  const area = make("textarea.words", { "aria-label": "Your question", rows: "2", dir: "auto" });
  area.value = turn.text;
  const kept = make("div.thumbs", {});
  const draw = () => kept.replaceChildren(...ids.map((id, at) => thumb(id, `Picture ${at + 1}`,
    make("button.remove", { type: "button", "aria-label": `Remove picture ${at + 1}`, click: () => ((ids = ids.filter((one) => one !== id)), draw()) }, icon("x")))));
  const close = () => (refresh(turn, actions), nodes.get(turn).querySelector(".doing")?.focus());
  const done = () => (area.value.trim() || ids.length ? actions.change(turn, area.value.trim(), ids) : area.focus());
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close(), event.stopPropagation();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), done();
  });
  draw();
  node.classList.add("editing");
  node.querySelector(".saying").replaceChildren(kept, area);
  node.querySelector(".doings").replaceChildren(
    make("button.plain", { type: "button", click: close }, "Cancel"), make("button.strong", { type: "button", click: done }, "Ask again"));
  area.focus();
}

function replied(turn, actions) {
  const words = make("div.text", { dir: "auto" });
  if (turn.state === "writing") words.append(turn.text ? turn.text : reading());
  else words.append(formatted(turn.text));
  const note = { stopped: "Stopped here.", done: turn.finish === "length" ? "Cut off: it reached the longest reply allowed." : turn.text ? "" : "The model had nothing to say." }[turn.state];
  return make(`article.turn.reply.${turn.state}`, { "aria-busy": String(turn.state === "writing") },
    make("h3.who", {}, turn.model),
    words,
    note ? make("p.aside", {}, note) : null,
    turn.trouble ? trouble(turn, actions) : null,
    turn.state === "writing" ? null : make("div.doings", {}, ...doings(turn, actions)));
}

export function reading() {
  return make("span.reading", { role: "img", "aria-label": "Reading" }, ...Array.from({ length: 9 }, () => make("i")));
}

function* doings(turn, actions) {
  if (turn.text) {
    yield doing("copy", "Copy", async (event) => {
      const button = event.currentTarget;
      await copy(turn.text);
      button.replaceChildren(icon("check"));
      setTimeout(() => button.replaceChildren(icon("copy")), 1200);
    });
  }
  if (!turn.trouble) yield make("span.only-last", {}, doing("again", "Write it anew", () => actions.again(turn)));
  if (turn.text) yield doing("eye", "What the model saw", () => actions.sight(turn));
  if (turn.text && actions.votes()) {
    for (const [kind, label] of [["up", "Good reply"], ["down", "Bad reply"], ["flag", "Report this reply"]]) {
      yield doing(kind, `${label} (kept in the server's log with this conversation's words)`, () => actions.vote(turn, kind), { "aria-pressed": String(turn.vote === kind) });
    }
  }
}

function trouble(turn, actions) {
  const { kind, title, words, wait } = turn.trouble;
  const buttons = {
    key: [make("button.strong", { type: "button", click: () => actions.askKey(turn) }, "Enter the key")],
    long: [make("button.strong", { type: "button", click: () => actions.edit(turn) }, "Change the question"), make("button.plain", { type: "button", click: () => actions.settings() }, "Settings")],
    picture: [make("button.strong", { type: "button", click: () => actions.edit(turn) }, "Change the question")],
    large: [make("button.strong", { type: "button", click: () => actions.edit(turn) }, "Change the question")],
  }[kind] ?? [make("button.strong", { type: "button", click: () => actions.again(turn) }, wait ? "Try now" : "Try again")];
  return make("div.trouble", { role: "alert" },
    make("strong", {}, title), make("p", { dir: "auto" }, words),
    make("p.soon", {}, wait ? `Trying again in ${wait} s` : ""),
    make("div.buttons", {}, ...buttons));
}

export function openEdit(turn, actions) {
  edit(turn, actions);
}
