// The server, spoken to as any client does, and its errors in words for a person.

import * as keep from "./keep.js";

// What went wrong, what to do, and how to go on: `kind` is one of key, busy, gone, cut, long, picture, model, large, other.
export class Trouble extends Error {
  constructor(kind, title, words, { wait = 0, code = null } = {}) {
    super(title);
    Object.assign(this, { kind, title, words, wait, code });
  }
}

const BUSY = { model_loading: "The model is being loaded", shutting_down: "The server is about to stop", engine_dead: "The server is starting anew" };

const megabytes = (bytes) => (bytes / 1e6).toFixed(bytes < 1e6 ? 2 : 1);
const address = (path) => new URL(path, document.baseURI);

function headers(more = {}) {
  const key = keep.key.read();
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

let largest = Infinity; // bytes of a request: a server that refuses a larger one hangs up, which looks like a server that is gone

export const allow = (bytes) => (largest = bytes ?? Infinity);

async function call(path, { body, signal } = {}) {
  const data = body === undefined ? null : new Blob([JSON.stringify(body)]);
  if (data?.size > largest) throw new Trouble("large", "Too large to send", `The conversation has ${megabytes(data.size)} MB with its pictures, where this server takes ${megabytes(largest)} MB. Send fewer or smaller pictures.`);
  const options = data ? { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: data, signal } : { headers: headers(), signal };
  let response;
  try {
    response = await fetch(address(path), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw gone();
  }
  if (!response.ok) throw await refused(response, body?.messages);
  return response;
}

export const get = async (path, options) => (await call(path, options)).json();
export const post = async (path, body, options) => (await call(path, { ...options, body })).json();

export async function alive() {
  try {
    const health = await fetch(address("ready"), { cache: "no-store", headers: headers() });
    return health.ok || health.status === 401;
  } catch {
    return false;
  }
}

const gone = () => new Trouble("gone", "The server does not answer", "It may be starting anew. Your conversation is kept in this tab; try again when it is back.");

// One reply as it is written. `piece` is called with new text; returns {id, finish, usage}. Throws Trouble, and AbortError when stopped.
export async function reply(body, { signal, piece, began }) {
  const response = await call("v1/chat/completions", { body: { ...body, stream: true, stream_options: { include_usage: true } }, signal });
  const done = { id: null, finish: null, usage: null };
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return done;
      const chunk = JSON.parse(data);
      if (chunk.error) throw explained(chunk.error, 500);
      began?.();
      done.id ??= chunk.id;
      done.usage = chunk.usage ?? done.usage;
      const [choice] = chunk.choices ?? [];
      if (choice?.delta?.content) piece(choice.delta.content);
      done.finish = choice?.finish_reason ?? done.finish;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Trouble) throw error;
  }
  if (done.finish) return done;
  throw new Trouble("cut", "The connection broke before the reply ended", "What was written so far is kept. Try again to have it written anew.");
}

// The data of server-sent events, one after the other.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield data.join("\n");
    }
  }
}

async function refused(response, messages) {
  const told = await response.json().catch(() => ({}));
  return explained(told.error ?? {}, response.status, Number(response.headers.get("retry-after")) || 0, messages);
}

function explained({ message, code, param }, status, wait = 0, messages = []) {
  const which = pictureAt(param ?? "", messages);
  const words = sentences(which ? `picture ${which}: ${message}` : message ?? "");
  if (status === 401) return new Trouble("key", "This server asks for a key", words || "Enter the key that whoever runs it gave you.");
  if (status === 503 || status === 429) return new Trouble("busy", BUSY[code] ?? "The server is busy", words || "It replies to others first.", { wait: Math.min(Math.max(wait, 1), 120), code });
  if (code === "context_length_exceeded") return new Trouble("long", "Too long for this model", words);
  if (which || String(code).startsWith("image_")) return new Trouble("picture", "A picture cannot be used", words);
  if (status === 404) return new Trouble("model", "This server does not have that model any more", words);
  if (status === 413 || code === "media_budget_exceeded" || code === "too_many_images") return new Trouble("large", "Too large to send", words || "Send fewer or smaller pictures.");
  if (status >= 500) return new Trouble("other", "The server failed", words || "Try again; if it stays so, its log says why.");
  return new Trouble("other", "The server would not take this", words || `It answered ${status} and no more.`);
}

// The number of the picture that a field of the request holds: "messages[2].content[0].image_url.url", or "images[1]"; else 0.
function pictureAt(param, messages) {
  const numbered = /^images\[(\d+)\]/.exec(param);
  if (numbered) return Number(numbered[1]) + 1;
  const named = /^messages\[(\d+)\]\.content\[(\d+)\]/.exec(param);
  if (!named) return 0;
  const all = messages.flatMap(({ content }, at) => (Array.isArray(content) ? content.map((part, place) => [part.type, at, place]) : []));
  const pictures = all.filter(([type]) => type === "image_url");
  return pictures.findIndex(([, at, place]) => at === Number(named[1]) && place === Number(named[2])) + 1;
}

// The server's words as sentences: they begin small after a colon and after a remedy's full stop.
function sentences(message) {
  return message.replace(/(^|[.!?] )(\p{Ll})/gu, (_, before, letter) => before + letter.toUpperCase()).replace(/([^.!?])$/, "$1.");
}
