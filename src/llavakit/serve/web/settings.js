// How replies are made and how the page looks. Kept in this browser; the key only in this tab.

import { $ } from "./dom.js";
import * as keep from "./keep.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
let chosen = keep.choices.read();
let standard = { temperature: 0, top_p: 1, max_tokens: 256, seed: null };

export function start({ save, changed }) {
  $("settings-button").addEventListener("click", open);
  $("settings").addEventListener("click", (event) => event.target === $("settings") && $("settings").close());
  $("settings").addEventListener("input", (event) => take(event.target));
  $("settings").addEventListener("close", changed);
  $("export").addEventListener("click", save);
  $("defaults").addEventListener("click", () => {
    for (const name of ["system", ...NUMBERS]) delete chosen[name];
    keep.choices.write(chosen);
    fill();
  });
  paint();
}

export const serverSays = (sampling) => (standard = { ...standard, ...sampling });
export const model = { get: () => chosen.model, set: (name) => put("model", name) };
export const system = () => (typeof chosen.system === "string" ? chosen.system : "");

export function parameters() {
  const found = {};
  for (const name of NUMBERS) {
    const value = Number.isFinite(chosen[name]) ? chosen[name] : standard[name];
    if (Number.isFinite(value)) found[name] = value;
  }
  return found;
}

export function open() {
  fill();
  $("settings").showModal();
}

function fill() {
  $("set-system").value = system();
  const all = parameters();
  for (const name of NUMBERS) $(`set-${name}`).value = all[name] ?? "";
  for (const input of $("set-theme").querySelectorAll("input")) input.checked = input.value === (chosen.theme ?? "auto");
  $("set-key").value = keep.key.read();
  $("key-field").hidden = !keep.key.read();
}

function take(input) {
  if (input.name === "theme") put("theme", input.value), paint();
  else if (input.id === "set-key") keep.key.write(input.value.trim());
  else if (input.id === "set-system") put("system", input.value);
  else if (input.validity.valid) put(input.id.slice(4), input.value === "" ? null : Number(input.value));
}

function put(name, value) {
  chosen[name] = value;
  keep.choices.write(chosen);
}

function paint() {
  const theme = ["light", "dark"].includes(chosen.theme) ? chosen.theme : "auto";
  document.documentElement.dataset.theme = theme;
}

// Ask for the key; resolves to whether one was given.
export function askKey() {
  const dialog = $("key");
  $("key-words").value = dialog.returnValue = "";
  $("key-later").onclick = () => dialog.close();
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "ok" ? $("key-words").value.trim() : "";
      if (given) keep.key.write(given);
      done(Boolean(given));
    }, { once: true });
  });
}
