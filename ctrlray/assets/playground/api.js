// The server's API: the key, requests, event streams, and errors as what happened and what to do next.

const KEY = "ctrlray-key";
let inMemory = ""; // where the browser keeps nothing

export const key = {
  get: () => {
    try {
      return sessionStorage.getItem(KEY) || inMemory;
    } catch {
      return inMemory;
    }
  },
  set: (value) => {
    inMemory = value;
    try {
      if (value) sessionStorage.setItem(KEY, value);
      else sessionStorage.removeItem(KEY);
    } catch {
      // it lasts until the page is left
    }
  },
};

const NEXT = {
  400: "Change what it names and send again.",
  401: "Give a key that this server knows.",
  403: "Stay inside of your key's bounds, or ask the operator for wider ones.",
  404: "Choose another model.",
  413: "Send less text at once.",
  429: "Wait, then try again.",
  503: "Wait a little, then try again.",
};
const TITLES = {
  401: "The server does not know this key",
  403: "Your key does not allow this",
  429: "Too much at once",
  503: "The model is not available",
};

export class Problem extends Error {
  constructor(status, message, { title, next, retryAfterS = 0, code = null } = {}) {
    super(message);
    this.status = status; // 0 when there is no answer
    this.title = title ?? TITLES[status] ?? "The server refused this";
    this.next = next ?? NEXT[status] ?? "Try again; if it happens again, the server's log has the details.";
    this.retryAfterS = retryAfterS;
    this.code = code;
  }
}

const unreachable = () =>
  new Problem(0, "No answer came back.", { title: "The server cannot be reached", next: "Check that it runs and that you are connected, then try again." });
export const brokenOff = (message = "The connection ended before the answer did.") =>
  new Problem(0, message, { title: "The answer broke off", next: "What arrived is kept. Try again for a whole one." });

const problemOf = async (response) => {
  const error = await response.json().then((body) => body.error, () => null);
  const retryAfterS = Number(response.headers.get("Retry-After")) || 0;
  const next = error?.code === "context_length_exceeded" ? "Begin a new conversation, or send less text." : undefined;
  return new Problem(response.status, error?.message || `HTTP ${response.status}`, { next, retryAfterS, code: error?.code });
};

const call = async (path, body, signal) => {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    // relative, so that the page also works under a path of a proxy
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store", credentials: "omit" });
  } catch (error) {
    throw signal?.aborted ? error : unreachable();
  }
  if (!response.ok) throw await problemOf(response);
  return response;
};

const read = async (response) => {
  try {
    return await response.json();
  } catch {
    throw brokenOff();
  }
};

export const control = async () => read(await call("v1/control"));

export const scores = async (body, signal) => (await read(await call("v1/control/scores", body, signal))).achieved;

// the data of each server-sent event
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const whole = rest.split("\n\n");
      rest = whole.pop();
      for (const event of whole) if (event.startsWith("data: ")) yield event.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Pieces of an answer: { levels, clamped } first, then any of { text, achieved, finish, usage }.
export async function* answer(body, signal) {
  const response = await call("v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const clamped = (response.headers.get("X-Control-Clamped") || "").split(", ").filter(Boolean);
  try {
    for await (const event of events(response.body)) {
      if (event === "[DONE]") return;
      const { error, control: levels, choices = [], usage } = JSON.parse(event);
      if (error) throw brokenOff(error.message);
      if (levels) yield { levels, clamped };
      if (usage) yield { usage };
      for (const c of choices) yield { text: c.delta.content || "", finish: c.finish_reason, achieved: c.achieved };
    }
  } catch (error) {
    throw signal.aborted || error instanceof Problem ? error : brokenOff();
  }
  throw brokenOff();
}
