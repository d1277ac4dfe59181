// The box at the bottom: words and pictures that were not sent yet.

import { $, announce, icon, make } from "./dom.js";
import * as pictures from "./pictures.js";
import { thumb } from "./turns.js";

let picked = []; // ids
let limits = { max_image_pixels: 1 << 26, max_image_bytes: 1 << 26, max_image_side: 65_535, max_images: 32 };
let actions = {};

export function start(given) {
  actions = given;
  $("composer").addEventListener("submit", (event) => (event.preventDefault(), send()));
  $("words").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), send();
  });
  $("words").addEventListener("input", shape);
  $("pick").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", () => (add($("files").files), ($("files").value = "")));
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length) event.preventDefault(), add(files);
  });
  dragging();
  shape();
}

export const allow = (found) => (limits = { ...limits, ...found });
export const draft = () => ({ text: $("words").value.trim(), pictures: [...picked] });

export function clear() {
  picked = [];
  $("words").value = "";
  say("");
  draw();
}

export function say(words) {
  $("said").textContent = words;
  $("said").hidden = !words;
}

export function busy(on) {
  const had = document.activeElement === $("send") || document.activeElement === $("stop");
  $("send").hidden = on;
  $("stop").hidden = !on;
  if (had) (on ? $("stop") : $("words")).focus();
}

function send() {
  const { text, pictures: ids } = draft();
  if (actions.busy()) return;
  if (!text && !ids.length) return $("words").focus();
  actions.send(text, ids);
}

// One after the other, so that they stay in order; what cannot be used is said, the others are kept.
let adding = Promise.resolve();

export function add(files) {
  const given = [...files]; // a list that empties itself when its input is cleared
  adding = adding.then(() => addAll(given));
  return adding;
}

async function addAll(files) {
  const notes = [];
  for (const file of files) {
    if (actions.pictures() + picked.length >= limits.max_images) {
      notes.push(`This server takes ${limits.max_images} pictures in a conversation; the rest was left out.`);
      break;
    }
    try {
      const { picture, note } = await pictures.take(file, limits);
      picked.push(picture.id);
      if (note) notes.push(note);
    } catch (error) {
      if (!(error instanceof pictures.NoPicture)) throw error;
      notes.push(error.message);
    }
  }
  say(notes.join(" "));
  draw();
  if (picked.length) announce(`${picked.length} ${picked.length > 1 ? "pictures" : "picture"} to send.`);
  $("words").focus();
}

function draw() {
  $("picked").replaceChildren(...picked.map((id, at) => make("li", {}, thumb(id, `Picture ${at + 1}`, removing(id, at)))));
  $("words").placeholder = picked.length ? "Ask something about it" : actions.begun?.() ? "Ask more" : "Add a picture and ask something";
  shape();
  actions.changed?.();
}

function removing(id, at) {
  const gone = () => {
    picked = picked.filter((one) => one !== id);
    pictures.forget([id]);
    draw();
    $("words").focus();
  };
  return make("button.remove", { type: "button", "aria-label": `Remove picture ${at + 1}`, click: gone }, icon("x"));
}

function shape() {
  const area = $("words");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, window.innerHeight * 0.35)}px`;
  const { text, pictures: ids } = draft();
  $("send").setAttribute("aria-disabled", String(!text && !ids.length));
}

function dragging() {
  let depth = 0;
  const files = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const show = (on) => ($("drop").hidden = !on);
  addEventListener("dragenter", (event) => files(event) && (event.preventDefault(), depth++, show(true)));
  addEventListener("dragover", (event) => files(event) && event.preventDefault());
  addEventListener("dragleave", (event) => files(event) && --depth <= 0 && ((depth = 0), show(false)));
  addEventListener("drop", (event) => {
    if (!files(event)) return;
    event.preventDefault();
    depth = 0;
    show(false);
    add(event.dataTransfer.files);
  });
}

export const redraw = draw;
