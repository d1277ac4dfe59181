// "What the model sees": a conversation in tokens, its pictures with views, patches and padding drawn over them, and where it looked.

import * as api from "./api.js";
import { $, icon, make, number } from "./dom.js";
import { paint } from "./paint.js";
import * as pictures from "./pictures.js";

const MODES = [["views", "Views"], ["patches", "Patches"], ["attention", "Attention"]];
const PARTS = [["all", "All layers"], ["early", "First third"], ["middle", "Middle"], ["late", "Last third"]];
const MOST_WORDS = 400;

// `source()` gives {turns, model, reply, room, messages()}: the conversation up to the reply that is looked at, or the draft.
let source = null, picture = 0, mode = "views", part = "all", word = null, layers = 0;
let seen = null, looked = null, asked = 0, came = null, chosen = false;

export const isOpen = () => !$("sight").hidden;

export async function open(from) {
  source = from;
  came ??= document.activeElement;
  $("sight").hidden = false;
  document.body.classList.add("with-sight");
  $("main").inert = covers();
  $("sight-button").setAttribute("aria-expanded", "true");
  [picture, word, looked, chosen] = [0, null, null, false];
  if (!source().reply?.text && mode === "attention") mode = "views";
  $("sight-title").focus({ preventScroll: true });
  await refresh();
}

export function close() {
  if (!isOpen()) return;
  $("sight").hidden = true;
  document.body.classList.remove("with-sight");
  $("main").inert = false;
  $("sight-button").setAttribute("aria-expanded", "false");
  came?.focus();
  came = null;
}

const covers = () => matchMedia("(max-width: 900px)").matches;
addEventListener("resize", () => isOpen() && (($("main").inert = covers()), draw()));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => isOpen() && draw());

export async function refresh() {
  if (!isOpen()) return;
  const mine = ++asked, from = source();
  if (!from.turns.length) return body(make("p.empty", {}, "Add a picture, and this shows how the model cuts it, how many tokens it takes and, after a reply, where the model looked."));
  try {
    const found = await api.post("web/api/see", { model: from.model, messages: await from.messages() });
    if (mine !== asked) return;
    seen = { ...found, from };
    if (from.open && !chosen) picture = found.pictures.length; // the last is the newest
    picture = Math.min(picture, Math.max(0, found.pictures.length - 1));
    draw();
    if (mode === "attention") await look();
  } catch (error) {
    if (mine === asked) body(trouble(error));
  }
}

const body = (...children) => $("sight-body").replaceChildren(...children.filter(Boolean));
const trouble = (error) => make("div.trouble", { role: "alert" }, make("strong", {}, error.title ?? "This cannot be shown"), make("p", {}, error.words ?? String(error.message)));

function draw() {
  if (!seen) return;
  const focused = document.activeElement?.dataset?.spot;
  body(context(), seen.pictures.length ? gallery() : make("p.empty", {}, "There is no picture in this conversation."));
  if (focused) document.querySelector(`[data-spot="${focused}"]`)?.focus();
  paintNow();
}

// Tokens of the context, as a bar and in numbers.
function context() {
  const { from, context: all } = seen;
  const room = Math.max(0, Math.min(from.room, all - seen.tokens));
  const parts = [["spoken", "Words and template", seen.text_tokens], ["picture", seen.pictures.length > 1 ? `${seen.pictures.length} pictures` : "Picture", seen.image_tokens],
    ["room", "Kept free for the next reply", from.open ? from.room : room]];
  const over = seen.tokens + (from.open ? from.room : 0) > all;
  const bar = make("div.stack", { "aria-hidden": "true" }, ...parts.map(([name, , value]) => Object.assign(make(`i.${name}`), { value })));
  for (const piece of bar.children) piece.style.width = `${(100 * piece.value) / Math.max(all, seen.tokens + room)}%`;
  return make("section.context", {},
    make("p.sum", {}, make("strong", {}, number(seen.tokens)), ` of ${number(all)} tokens`, over ? make("em", {}, "too many") : null),
    bar,
    make("dl", {}, ...parts.flatMap(([name, label, value]) => [make(`dt.${name}`, {}, label), make("dd", {}, number(value))])));
}

function gallery() {
  const one = seen.pictures[picture];
  return make("section.gallery", {}, choosing(), modes(),
    make("figure", {}, make("canvas", { id: "sight-canvas", role: "img", "aria-label": told(one) }), make("figcaption", {}, told(one))),
    mode === "attention" ? words() : numbers(one));
}

function choosing() {
  if (seen.pictures.length < 2) return null;
  return make("div.thumbs", { role: "group", "aria-label": "Picture" }, ...ids().slice(0, seen.pictures.length).map((id, at) => {
    const held = pictures.get(id);
    const inner = held ? make("img", { src: held.url, alt: `Picture ${at + 1}` }) : make("span", {}, `${at + 1}`);
    return make("button.look", { type: "button", "aria-pressed": String(at === picture), "data-spot": `picture-${at}`, click: () => ((picture = at), (chosen = true), draw()) }, inner);
  }));
}

const ids = () => seen.from.turns.flatMap((turn) => turn.pictures ?? []).filter((id) => pictures.get(id));

function modes() {
  const can = { attention: Boolean(seen.from.reply?.text) && seen.from.attention };
  return make("div.segments", { role: "group", "aria-label": "Shown over the picture" }, ...MODES.map(([name, label]) => make("button", {
    type: "button", "aria-pressed": String(mode === name), "data-spot": `mode-${name}`, disabled: can[name] === false,
    title: can[name] === false ? "There is a word to choose once the model has replied" : null, click: () => choose(name),
  }, label)));
}

async function choose(name) {
  mode = name;
  draw();
  if (mode === "attention") await look();
}

function told(one) {
  if (mode === "attention") return looked ? `${percent(looked.shares[picture])} of all attention for “${spoken()}” was on this picture${looked.shares.length > 1 ? "" : ", the rest on words"}.` : "Where the model looked when it wrote a word.";
  const side = seen.side, grid = side / seen.patch | 0;
  if (mode === "patches") {
    const maps = one.patches.map((each) => by(each.columns, each.rows));
    return `${maps.join(" and ")} patches${one.row_ends ? ` and ${one.row_ends} row ends` : ""}: ${number(one.tokens)} tokens.`;
  }
  const shaped = { pad: "padded to a square", square: "cropped to its middle", squash: "squeezed to a square" }[seen.aspect];
  const base = `The whole picture, ${shaped}, is seen at ${by(side, side)}`;
  return one.canvas ? `${base}, then in ${by(one.columns, one.rows)} tiles of the same size on a canvas of ${by(...one.canvas)}.` : `${base}: ${by(grid, grid)} patches.`;
}

function numbers(one) {
  const rows = [["Picture", `${by(one.width, one.height)} pixels`], ["Views", one.views === 1 ? "1, the whole picture" : `${one.views}: the whole and ${by(one.columns, one.rows)} tiles`],
    ["A view", `${by(seen.side, seen.side)} pixels, patches of ${seen.patch}`],
    ...one.patches.map((each, at) => [at ? (one.patches.length > 2 ? `Tile ${at}` : "Tiles, padding left out") : "Whole picture", `${by(each.columns, each.rows)} = ${number(each.columns * each.rows)} tokens`]),
    one.row_ends ? ["Row ends", `${one.row_ends} tokens`] : null, ["Together", `${number(one.tokens)} tokens`]].filter(Boolean);
  return make("dl.numbers", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

// The words of the reply, one of which is looked at.
function words() {
  const text = seen.from.reply.text;
  const found = [...text.matchAll(/\S+/g)].slice(0, MOST_WORDS);
  const buttons = found.map((one, at) => make("button.word", { type: "button", "aria-pressed": String(word === at), "data-spot": `word-${at}`, click: () => ((word = at), draw(), look()) }, one[0]));
  return make("section.words", {},
    make("h3", {}, "Choose a word of the reply"),
    make("div.wordlist", {}, ...buttons, found.length === MOST_WORDS ? "…" : null),
    make("div.segments.small", { role: "group", "aria-label": "Layers" }, ...PARTS.map(([name, label]) => make("button", {
      type: "button", "aria-pressed": String(part === name), "data-spot": `part-${name}`, click: () => ((part = name), draw(), look()),
    }, label))),
    make("p.small", { id: "look-note" }, "Attention shows which patches were read, averaged over heads. It is a hint at why, not a proof."));
}

const spoken = () => [...seen.from.reply.text.matchAll(/\S+/g)][word]?.[0] ?? "";
const by = (across, down) => `${number(across)}\u00a0×\u00a0${number(down)}`;
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

function third() {
  if (part === "all" || !layers) return null;
  const cut = [0, Math.ceil(layers / 3), Math.ceil((2 * layers) / 3), layers];
  const at = ["early", "middle", "late"].indexOf(part);
  return cut[at] < cut[at + 1] ? [cut[at] + 1, cut[at + 1]] : [layers, layers];
}

async function look() {
  const mine = ++asked, from = seen.from;
  const found = [...from.reply.text.matchAll(/\S+/g)].slice(0, MOST_WORDS);
  word ??= found.reduce((best, one, at) => (one[0].length > found[best][0].length ? at : best), 0);
  const { index, 0: spelled } = found[word];
  const ask = async () => api.post("web/api/attention", { model: from.model, messages: await from.messages(), start: letters(from.reply.text, index), end: letters(from.reply.text, index + spelled.length), layers: third() });
  $("sight-canvas")?.classList.add("waiting");
  try {
    const known = layers;
    let answer = await ask();
    layers = answer.of;
    if (!known && part !== "all") answer = await ask();
    if (mine !== asked) return;
    looked = answer;
    if (!chosen && looked.shares.length) picture = looked.shares.indexOf(Math.max(...looked.shares)); // the one that was looked at most
    draw();
  } catch (error) {
    if (mine === asked) $("look-note")?.replaceWith(trouble(error));
  }
}

// The server counts characters, JavaScript halves of some of them.
const letters = (text, at) => [...text.slice(0, at)].length;

function paintNow() {
  const canvas = $("sight-canvas");
  const held = pictures.get(ids()[picture]);
  if (canvas) paint(canvas, held?.url, seen.pictures[picture], mode, looked?.pictures[picture]);
}
