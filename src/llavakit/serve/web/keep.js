// What outlives a reload: the turns in this tab (sessionStorage), their pictures (IndexedDB), choices (localStorage).
//
// Two tabs never see each other's turns. A picture is written once and never changed, so a tab that was duplicated may read it too.
// Where a store is not to be had (private windows, no room) everything lives in memory, and only a reload tells the difference.

const TURNS = "llavakit.turns", KEY = "llavakit.key", CHOICES = "llavakit.choices", BROKEN = "llavakit.broken";
const DAYS = 3; // that a forgotten picture is kept

const quietly = (work, otherwise) => {
  try {
    return work();
  } catch {
    return otherwise;
  }
};

export const turns = {
  read: () => quietly(() => sessionStorage.getItem(TURNS), null),
  write: (value) => quietly(() => (sessionStorage.setItem(TURNS, JSON.stringify(value)), true), false),
  setAside: (raw) => quietly(() => (sessionStorage.setItem(BROKEN, raw), sessionStorage.removeItem(TURNS))),
};

export const key = {
  read: () => quietly(() => sessionStorage.getItem(KEY), null) ?? "",
  write: (value) => quietly(() => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY))),
};

export const choices = {
  read: () => quietly(() => Object(JSON.parse(localStorage.getItem(CHOICES) ?? "{}")), {}),
  write: (value) => quietly(() => localStorage.setItem(CHOICES, JSON.stringify(value))),
};

let opening = null;

function database() {
  opening ??= new Promise((done, failed) => {
    const asked = indexedDB.open("llavakit", 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore("pictures", { keyPath: "id" });
    asked.onsuccess = () => done(asked.result);
    asked.onerror = () => failed(asked.error);
  });
  return opening;
}

async function store(mode, work) {
  const pictures = (await database()).transaction("pictures", mode).objectStore("pictures");
  const asked = work(pictures);
  return new Promise((done, failed) => {
    asked.onsuccess = () => done(asked.result);
    asked.onerror = () => failed(asked.error);
  });
}

const forgiving = async (work, otherwise) => {
  try {
    return await work();
  } catch {
    return otherwise;
  }
};

export const pictures = {
  write: (picture) => forgiving(() => store("readwrite", (all) => all.put({ ...picture, at: Date.now() }))),
  read: (id) => forgiving(() => store("readonly", (all) => all.get(id)), undefined),
  forget: (ids) => Promise.all(ids.map((id) => forgiving(() => store("readwrite", (all) => all.delete(id))))),
  async sweep() {
    const all = await forgiving(() => store("readonly", (every) => every.getAll()), []);
    const old = all.filter((one) => !(one.at > Date.now() - DAYS * 86_400_000));
    await pictures.forget(old.map((one) => one.id));
  },
};
