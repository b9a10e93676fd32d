// Puts the page together: signing in, views, settings, and the one box that asks.

import { control, key, Problem } from "./api.js";
import { fit } from "./dials.js";
import { $, announce, h, notice } from "./dom.js";
import { Grid } from "./grid.js";
import { chat, compare } from "./lanes.js";
import { address, decode, follow, state, VIEWS } from "./link.js";

const STRATEGIES = { dial: "The model's own dial", rerank: "The best of several by score" };

let described = null; // what /v1/control says

// what views need to know, and how they say that they are at work
const session = {
  served: null,
  busy: 0,
  get concurrent() {
    return described.key.concurrent;
  },
  scored: () => described.scores && $("scores").checked,
  focus: () => $("prompt").focus(),
  refused: (status) => {
    if (status === 401) signIn("The key is no longer valid here.");
    if (status === 403 || status === 404) load().catch(() => {}); // bounds or models may have changed: show them as they are
  },
  track: async (work) => {
    session.busy += 1;
    show();
    try {
      await work();
    } finally {
      session.busy -= 1;
      show();
    }
  },
};

const views = { chat: chat($("view-chat"), session), compare: compare($("view-compare"), session), grid: new Grid($("view-grid"), session) };

// A button that goes hands its place in the order to the one that comes.
const show = () => {
  const had = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = session.busy > 0;
  $("stop").hidden = session.busy === 0;
  if (had) (session.busy ? $("stop") : $("send")).focus();
};

const stop = () => {
  if (!session.busy) return;
  for (const view of Object.values(views)) view.stop();
  announce("Stopped");
};

const select = (view, focus = false) => {
  state.view = view;
  for (const name of VIEWS) {
    const tab = $(`tab-${name}`);
    tab.setAttribute("aria-selected", String(name === view));
    tab.tabIndex = name === view ? 0 : -1;
    $(`view-${name}`).hidden = name !== view;
  }
  document.body.dataset.view = view;
  if (focus) $(`tab-${view}`).focus();
  views[view].draw();
  follow();
};

const options = (element, pairs, chosen) =>
  element.replaceChildren(...pairs.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));

// Make the state fit what the caller may use, and the page fit the state.
const draw = () => {
  const models = described.data;
  const wanted = state.model;
  session.served = models.find((m) => m.model === wanted) ?? models[0];
  state.model = session.served.model;
  const said = wanted && wanted !== state.model ? [`The model ${wanted} is not among those of your key; ${state.model} is.`] : [];
  for (const name of ["levels", "other"]) {
    const { levels, moved } = fit(session.served.attributes, state[name]);
    state[name] = levels;
    if (moved.length) said.push(`Moved into your key's bounds: ${moved.join(", ")}.`);
  }
  if (!session.served.strategies.includes(state.strategy)) state.strategy = "";
  notice([...new Set(said)].join(" "));
  options($("model"), models.map((m) => [m.model, m.model]), state.model);
  options($("strategy"), [["", "As the model is made"], ...session.served.strategies.map((s) => [s, STRATEGIES[s] ?? s])], state.strategy);
  $("models").hidden = models.length < 2;
  $("strategies").hidden = session.served.strategies.length < 2;
  $("scoring").hidden = !described.scores;
  $("system").value = state.system;
  $("max-tokens").value = state.maxTokens ?? "";
  $("max-tokens").max = described.key.max_tokens ?? "";
  $("temperature").value = state.temperature ?? "";
  select(state.view);
};

const signIn = (why = "") => {
  for (const id of ["work", "ask", "views", "link", "sign-out", "models"]) $(id).hidden = true;
  $("sign-in").hidden = false;
  notice(why);
  $("key").value = "";
  $("key").focus();
};

const load = async () => {
  const found = await control();
  if (!found.data.length) throw new Problem(403, "This key may use no model.");
  described = found;
  for (const id of ["work", "ask", "views", "link"]) $(id).hidden = false;
  $("sign-out").hidden = !key.get();
  $("sign-in").hidden = true;
  draw();
};

// With the key at hand, or without one; what goes wrong is said where it can be mended.
const begin = async () => {
  const had = key.get();
  try {
    await load();
    session.focus();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (error.status === 401) key.set("");
    const known = error.status !== 401 || had;
    signIn(known ? `${error.title}. ${error.message} ${error.next}` : "");
  }
};

const ask = () => {
  const prompt = $("prompt").value.trim();
  if (!prompt || session.busy) return;
  notice("");
  if (state.view !== "grid") $("prompt").value = "";
  const view = views[state.view];
  session.track(() => view.ask(prompt));
};

const number = (input) => (input.value === "" || !input.validity.valid ? null : Number(input.value));

const follows = {
  prompt: () => (state.prompt = $("prompt").value),
  system: () => (state.system = $("system").value),
  "max-tokens": () => (state.maxTokens = number($("max-tokens"))),
  temperature: () => (state.temperature = number($("temperature"))),
  strategy: () => (state.strategy = $("strategy").value),
};
for (const [id, take] of Object.entries(follows)) {
  $(id).addEventListener("input", () => {
    take();
    follow();
  });
}

$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(given)) return notice("A key has no spaces and no letters beyond ASCII. Copy it again.");
  key.set(given);
  begin();
});
$("sign-out").addEventListener("click", () => {
  stop();
  for (const view of Object.values(views)) view.forget();
  Object.assign(state, { prompt: "", system: "" });
  $("prompt").value = $("system").value = "";
  announce("");
  follow();
  key.set("");
  signIn();
});
$("model").addEventListener("change", () => {
  state.model = $("model").value;
  draw();
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("stop").addEventListener("click", stop);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
$("link").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(address());
    notice("");
    announce("Link copied");
    $("link").textContent = "Copied";
    setTimeout(() => ($("link").textContent = "Copy link"), 2000);
  } catch {
    history.replaceState(null, "", address());
    notice("This browser does not let the page copy; the address bar has the link.");
  }
});
for (const name of VIEWS) {
  $(`tab-${name}`).addEventListener("click", () => select(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    const at = VIEWS.indexOf(name);
    const to = { ArrowRight: (at + 1) % VIEWS.length, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault(); // Home and End scroll too
    select(VIEWS.at(to), true);
  });
}
const arrive = () => {
  decode(location.hash);
  $("prompt").value = state.prompt;
};
addEventListener("hashchange", () => {
  arrive();
  if (described) draw();
});

arrive();
begin();
