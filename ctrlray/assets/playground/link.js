// The page's settings, and their form in the address: everything after `#`, which browsers do not send to servers.
// Only what is listed here goes into a link; the key and the conversation do not.

export const VIEWS = ["chat", "compare", "grid"];

// levels: of the chat and of side A; other: of side B; columns, rows: attributes that the grid is made of
export const state = {
  view: "chat",
  model: "",
  levels: {},
  other: {},
  columns: "",
  rows: "",
  prompt: "",
  system: "",
  maxTokens: null,
  temperature: null,
  strategy: "",
};

const TEXTS = ["view", "model", "columns", "rows", "prompt", "system", "strategy"];
const LEVELS = ["levels", "other"];
const NUMBERS = ["maxTokens", "temperature"];
const LONGEST = 20000; // of a text in a link; browsers take more, people who paste it elsewhere may not

const fromLevels = (text) => {
  const pairs = text.split(",").map((pair) => pair.split(":"));
  return Object.fromEntries(pairs.filter(([name, level]) => name && Number.isInteger(Number(level))).map(([n, l]) => [n, Number(l)]));
};

export const encode = () => {
  const made = new URLSearchParams();
  for (const name of TEXTS) if (state[name]) made.set(name, state[name].slice(0, LONGEST));
  for (const name of LEVELS) {
    const pairs = Object.entries(state[name]).map(([attribute, level]) => `${attribute}:${level}`);
    if (pairs.length) made.set(name, pairs.join(","));
  }
  for (const name of NUMBERS) if (state[name] !== null) made.set(name, state[name]);
  return made.toString().replaceAll("%3A", ":").replaceAll("%2C", ",");
};

// Take up what an address says; what it does not say, or says wrongly, stays as it is.
export const decode = (fragment) => {
  const given = new URLSearchParams(fragment.replace(/^#/, ""));
  for (const name of TEXTS) if (given.has(name)) state[name] = given.get(name);
  for (const name of LEVELS) if (given.has(name)) state[name] = { ...state[name], ...fromLevels(given.get(name)) };
  for (const name of NUMBERS) if (given.get(name) && Number.isFinite(Number(given.get(name)))) state[name] = Number(given.get(name));
  if (!VIEWS.includes(state.view)) state.view = "chat";
};

let waiting = 0;

// The address follows the settings, not faster than browsers allow.
export const follow = () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => history.replaceState(null, "", `#${encode()}`), 300);
};

export const address = () => `${location.href.split("#")[0]}#${encode()}`;
