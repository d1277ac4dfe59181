// A conversation as a value: turns, and nothing of how they look.
//
//   {role: "user", text, pictures: [id, ...]}
//   {role: "assistant", text, state: "writing" | "done" | "stopped" | "failed", trouble, model, id, usage, finish, vote}

const STATES = ["done", "stopped", "failed"];
const TROUBLES = ["key", "busy", "gone", "cut", "long", "picture", "model", "large", "other"];

export function question(text, pictures) {
  return { role: "user", text, pictures };
}

export function reply(model) {
  return { role: "assistant", text: "", state: "writing", model, trouble: null, id: null, usage: null, finish: null, vote: null };
}

// The turns that count: a question that got no words in reply is shown, but it is no part of the conversation.
export function answered(turns) {
  const counts = (turn, at) => (turn.role === "user" ? at === turns.length - 1 || turns[at + 1].text : turn.text);
  return turns.filter(counts);
}

// OpenAI's messages. `url` gives a picture's data URL, or nothing when it is no longer kept.
export async function messages(turns, system, url) {
  const found = system.trim() ? [{ role: "system", content: system.trim() }] : [];
  for (const turn of answered(turns)) {
    if (turn.role === "assistant") {
      found.push({ role: "assistant", content: turn.text });
      continue;
    }
    const urls = (await Promise.all(turn.pictures.map(url))).filter(Boolean);
    const parts = urls.map((one) => ({ type: "image_url", image_url: { url: one } }));
    if (turn.text) parts.push({ type: "text", text: turn.text });
    found.push({ role: "user", content: urls.length ? parts : turn.text });
  }
  return found;
}

export const pictures = (turns) => turns.flatMap((turn) => turn.pictures ?? []);

// Turns from a store that anything may have written into; throws when they are none.
export function revived(raw) {
  const turns = JSON.parse(raw);
  if (!Array.isArray(turns)) throw new TypeError("no turns");
  return turns.map((turn, at) => {
    const role = at % 2 ? "assistant" : "user";
    if (turn?.role !== role || typeof turn.text !== "string") throw new TypeError("no turn");
    if (role === "user") {
      if (!Array.isArray(turn.pictures) || turn.pictures.some((id) => typeof id !== "string")) throw new TypeError("no pictures");
      return question(turn.text, turn.pictures);
    }
    const state = STATES.includes(turn.state) ? turn.state : "stopped";
    const usage = Number.isFinite(turn.usage?.prompt_tokens + turn.usage?.completion_tokens) ? turn.usage : null;
    const { kind, title, words } = Object(turn.trouble);
    const told = TROUBLES.includes(kind) ? { kind, title: String(title), words: String(words), wait: 0 } : null;
    return { ...reply(String(turn.model ?? "")), text: turn.text, state, usage, trouble: told, id: turn.id ?? null, finish: turn.finish ?? null, vote: turn.vote ?? null };
  });
}
