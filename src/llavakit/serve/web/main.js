// The page: joins the conversation, the box below it, the server and the panels.

import * as api from "./api.js";
import * as composer from "./composer.js";
import { $, announce, make, number } from "./dom.js";
import * as keep from "./keep.js";
import * as pictures from "./pictures.js";
import * as settings from "./settings.js";
import * as sight from "./sight.js";
import * as talk from "./talk.js";
import * as view from "./turns.js";

const RETRIES = 5; // of its own accord, while the server is busy

let turns = [];
let server = { models: [], votes: false };
let writing = null; // AbortController of the reply being written
let waiting = null; // timer of the next try
let looking = false; // for a server that is not ready
let leaving = false; // the page is about to go, and its requests break off

const actions = {
  busy: () => writing !== null,
  votes: () => server.votes,
  change: (turn, text, ids) => ask(text, ids, turns.indexOf(turn)),
  edit: (turn) => view.openEdit(turns[turns.indexOf(turn) - 1], actions),
  again: (turn) => turn === turns.at(-1) && !writing && anew(turn),
  askKey: async (turn) => (await settings.askKey()) && (await begin(), actions.again(turn)),
  settings: () => settings.open(),
  sight: (turn) => sight.open(() => sightOf(turn)),
  vote,
};

composer.start({
  busy: actions.busy,
  send: (text, ids) => ask(text, ids),
  pictures: () => talk.pictures(turns).length,
  changed: () => sight.refresh(),
  begun: () => turns.length > 0,
});
settings.start({ save, changed: () => sight.refresh() });
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", fresh);
$("sight-button").addEventListener("click", () => (sight.isOpen() ? sight.close() : sight.open(() => sightOf(turns.at(-1)))));
$("meter").addEventListener("click", () => sight.open(() => sightOf(turns.at(-1))));
$("sight-close").addEventListener("click", sight.close);
$("model").addEventListener("change", () => (settings.model.set($("model").value), meter(), sight.refresh()));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (writing || waiting) stop();
  else sight.close();
});
for (const event of ["beforeunload", "pagehide"]) addEventListener(event, () => ((leaving = true), keep.turns.write(turns)));
addEventListener("pageshow", () => (leaving = false));

await restore();
await begin();

async function restore() {
  const raw = keep.turns.read();
  if (raw) {
    try {
      turns = talk.revived(raw);
    } catch {
      keep.turns.setAside(raw);
      composer.say("The conversation kept in this tab could not be read. It was set aside; this is a new one.");
    }
  }
  await pictures.restore(talk.pictures(turns));
  await keep.pictures.sweep();
}

// What the server offers; asked again after a key was entered or the server was away.
async function begin() {
  try {
    const [list, allowed] = await Promise.all([api.get("v1/models"), api.get("web/api/settings")]);
    server = { ...allowed, models: list.data.map((one) => ({ ...allowed.models.find((other) => other.id === one.id), id: one.id })) };
    $("status").replaceChildren();
  } catch (error) {
    if (!(error instanceof api.Trouble)) throw error;
    notReady(error);
  }
  settings.serverSays(server.sampling ?? {});
  composer.allow(server);
  api.allow(server.max_body);
  const names = server.models.map((one) => one.id);
  const wanted = names.includes(settings.model.get()) ? settings.model.get() : names[0];
  $("model").replaceChildren(...(names.length ? names : ["no model"]).map((name) => make("option", { value: name, selected: name === wanted }, name)));
  $("model").disabled = names.length < 2;
  $("examples").replaceChildren(...(server.examples ?? []).map(example));
  draw();
}

function notReady(error) {
  if (error.kind !== "key") untilReady();
  if (error.code === "model_loading") {
    $("status").replaceChildren(make("div.trouble.calm", { role: "status" }, view.reading(), make("div", {}, make("strong", {}, error.title), make("p", {}, "This page goes on by itself once it is ready."))));
    return;
  }
  const again = make("button.strong", { type: "button", click: async () => (error.kind === "key" && !(await settings.askKey())) || begin() }, error.kind === "key" ? "Enter the key" : "Try again");
  $("status").replaceChildren(make("div.trouble", { role: "alert" }, make("strong", {}, error.title), make("p", {}, error.words), make("div.buttons", {}, again)));
}

async function untilReady() {
  if (looking) return;
  looking = true;
  do await new Promise((done) => setTimeout(done, 1000));
  while (!(await api.alive()));
  looking = false;
  if (!server.models.length) await begin();
}

function example({ picture, question }) {
  const take = async () => {
    const blob = await (await fetch(new URL(picture, document.baseURI))).blob();
    const { picture: taken } = await pictures.take(new File([blob], picture.split("/").at(-1), { type: blob.type }), server);
    if (!writing) ask(question, [taken.id]);
  };
  return make("li", {}, make("button", { type: "button", click: take }, make("img", { src: picture, alt: "" }), make("span", {}, question)));
}

function draw() {
  view.show(turns, actions);
  composer.redraw();
  meter();
}

function room() { return settings.parameters().max_tokens; }
function modelNow() { return $("model").value; }

// Ask a question; `at`: in the place of an earlier one, and what followed it is forgotten.
async function ask(text, ids, at = turns.length) {
  if (writing) return;
  waitNoMore();
  const dropped = talk.pictures(turns.slice(at)).filter((id) => !ids.includes(id));
  turns = [...turns.slice(0, at), talk.question(text, ids), talk.reply(modelNow())];
  pictures.forget(dropped);
  if (at === turns.length - 2) composer.clear();
  draw();
  view.toEnd();
  await write(turns.at(-1));
}

async function anew(turn) {
  clearTimeout(waiting);
  waiting = null;
  Object.assign(turn, talk.reply(modelNow()));
  view.refresh(turn, actions);
  await write(turn);
}

async function write(turn, tries = 0) {
  const control = (writing = new AbortController());
  composer.busy(true);
  announce("Reading.");
  try {
    const messages = await talk.messages(turns.slice(0, -1), settings.system(), pictures.dataUrl);
    const saving = setInterval(() => keep.turns.write(turns), 1000);
    const piece = (words) => ((turn.text += words), view.grow(turn));
    try {
      Object.assign(turn, await api.reply({ model: turn.model, messages, ...settings.parameters() }, { signal: control.signal, piece }), { state: "done" });
    } finally {
      clearInterval(saving);
    }
    announce(turn.text);
  } catch (error) {
    turn.state = leaving || error.name === "AbortError" ? "stopped" : "failed";
    if (turn.state === "failed") failed(turn, error, tries);
    else announce("Stopped.");
  }
  writing = null;
  composer.busy(false);
  finish(turn);
}

function finish(turn) {
  const follow = view.nearEnd();
  view.refresh(turn, actions);
  if (follow) view.toEnd();
  if (!keep.turns.write(turns)) composer.say("This browser has no room to keep the conversation: a reload would lose it. Save it in the settings.");
  meter();
  sight.refresh();
}

function failed(turn, error, tries) {
  if (!(error instanceof api.Trouble)) console.error(error);
  const { kind, title, words, wait } = error instanceof api.Trouble ? error : new api.Trouble("other", "The page made a mistake", "Reload it; the conversation is kept.");
  const seconds = kind === "busy" && tries < RETRIES ? wait : 0;
  turn.trouble = { kind, title, words, wait: seconds };
  if (seconds) countdown(turn, tries);
  if (kind === "gone" || kind === "cut") untilBack(turn);
  if (kind === "model") begin();
}

function countdown(turn, tries) {
  waiting = setTimeout(() => {
    if (!turns.includes(turn) || !turn.trouble) return;
    turn.trouble.wait -= 1;
    if (turn.trouble.wait > 0) return view.nodeOf(turn).querySelector(".soon").replaceChildren(`Trying again in ${turn.trouble.wait} s`), countdown(turn, tries);
    waiting = null;
    Object.assign(turn, talk.reply(turn.model));
    view.refresh(turn, actions);
    write(turn, tries + 1);
  }, 1000);
}

async function untilBack(turn) {
  while (turns.at(-1) === turn && turn.trouble) {
    await new Promise((done) => setTimeout(done, 1000));
    if (!(await api.alive())) continue;
    if (!turn.trouble) return;
    const words = turn.trouble.kind === "gone" ? "Your conversation was kept in this tab." : turn.trouble.words;
    turn.trouble = { ...turn.trouble, title: "The server is back", words };
    return view.refresh(turn, actions);
  }
}

function stop() {
  writing?.abort();
  waitNoMore();
}

function waitNoMore() {
  if (!waiting) return;
  clearTimeout(waiting);
  waiting = null;
  const turn = turns.at(-1);
  if (turn.trouble) turn.trouble.wait = 0;
  finish(turn);
}

async function fresh() {
  stop();
  const old = talk.pictures(turns);
  turns = [];
  sight.close();
  keep.turns.write(turns);
  await pictures.forget(old);
  composer.clear();
  draw();
  $("words").focus();
}

// The context that the last reply used, in the box below.
function meter() {
  const used = turns.findLast((turn) => turn.usage)?.usage;
  const context = server.models.find((one) => one.id === modelNow())?.context;
  $("meter").hidden = !used || !context;
  if ($("meter").hidden) return;
  const total = used.prompt_tokens + used.completion_tokens;
  $("meter-words").textContent = `${number(total)} of ${number(context)} tokens`;
  $("meter-bar").style.width = `${Math.min(100, (100 * total) / context)}%`;
  $("meter").classList.toggle("full", total + room() > context);
}

// What the panel looks at: the conversation up to a reply; what is picked but not sent, where there is something.
function sightOf(turn) {
  const draft = composer.draft();
  const drafting = draft.pictures.length > 0 || !turns.length;
  const until = drafting || !turn || !turns.includes(turn) ? turns.length : turns.indexOf(turn) + 1;
  let shown = turns.slice(0, until);
  if (shown.at(-1)?.role === "assistant" && !shown.at(-1).text && !drafting) shown = shown.slice(0, -1);
  if (drafting) shown = draft.text || draft.pictures.length ? [...shown, talk.question(draft.text, draft.pictures)] : [];
  shown = talk.answered(shown);
  const model = shown.at(-1)?.role === "assistant" && server.models.some((one) => one.id === shown.at(-1).model) ? shown.at(-1).model : modelNow();
  const reply = shown.at(-1)?.role === "assistant" ? shown.at(-1) : null;
  return {
    turns: shown, model, reply: reply?.state === "writing" ? null : reply, room: room(), open: !reply,
    attention: server.models.find((one) => one.id === model)?.attention ?? false,
    messages: () => talk.messages(shown, settings.system(), pictures.dataUrl),
  };
}

async function vote(turn, kind) {
  const chosen = turn.vote === kind ? null : kind;
  const told = turns.slice(0, turns.indexOf(turn) + 1).map((one) => ({ role: one.role, content: one.text, pictures: one.pictures?.length ?? 0 }));
  try {
    await api.post("web/api/vote", { kind: chosen ?? "none", reply_id: turn.id, model: turn.model, messages: told, parameters: settings.parameters() });
  } catch (error) {
    return composer.say(`The vote was not kept. ${error.words ?? ""}`);
  }
  turn.vote = chosen;
  finish(turn);
  view.nodeOf(turn).querySelector(`[aria-pressed="true"]`)?.focus();
  announce(chosen ? "Kept. Thank you." : "Taken back.");
}

async function save() {
  const whole = { format: "llavakit conversation 1", saved: new Date().toISOString(), model: modelNow(), parameters: settings.parameters(), messages: await talk.messages(turns, settings.system(), pictures.dataUrl) };
  const url = URL.createObjectURL(new Blob([JSON.stringify(whole, null, 1)], { type: "application/json" }));
  make("a", { href: url, download: `conversation-${whole.saved.slice(0, 19).replaceAll(":", "-")}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
