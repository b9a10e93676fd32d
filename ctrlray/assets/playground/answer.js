// One answer: asked for, streamed in, stopped, scored, tried again.

import { answer, brokenOff, Problem, scores } from "./api.js";
import { tone } from "./dials.js";
import { h, many, seen, spoken, svg, unseen } from "./dom.js";
import { state } from "./link.js";

const PATIENCE = 6; // times that an answer waits by itself when the server says for how long
const LONGEST_WAIT_S = 65;
const FINISHED = { length: "cut off at the longest length" };

// a line from the first level to the last: a ring where it was asked to be, a dot where it is
const track = (attribute, asked, achieved) => {
  const at = (level) => 6 + (88 * (Math.min(Math.max(level, 1), attribute.levels) - 1)) / (attribute.levels - 1);
  const marks = Array.from({ length: attribute.levels }, (_, i) => svg("circle", { cx: at(i + 1), cy: 8, r: 1.2, class: "step" }));
  return svg(
    "svg",
    { class: "track", viewBox: "0 0 100 16", "aria-hidden": "true", focusable: "false" },
    svg("line", { x1: 6, x2: 94, y1: 8, y2: 8 }),
    ...marks,
    achieved === null ? null : svg("circle", { cx: at(achieved), cy: 8, r: 3.6, class: "dot" }),
    svg("circle", { cx: at(asked), cy: 8, r: 5.6, class: "ring" }),
  );
};

const row = (attribute, index, asked, achieved, clamped) => {
  const known = achieved !== undefined;
  return h(
    "div",
    { class: tone(index) },
    h("dt", {}, seen("● "), attribute.name),
    h("dd", {}, unseen(" asked for "), h("b", {}, String(asked)), clamped ? " (moved into your bounds)" : null),
    known ? h("dd", {}, track(attribute, asked, achieved)) : null,
    known ? h("dd", { class: "got" }, unseen(" achieved "), achieved === null ? "no score" : achieved.toFixed(1)) : null,
  );
};

const pause = (seconds, signal) =>
  new Promise((resolve, reject) => {
    const end = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => (clearTimeout(end), reject(signal.reason)), { once: true });
  });

export class Answer {
  // `served` is the model as /v1/control describes it; `patient` answers wait and try again by themselves when asked to
  constructor({ served, levels, title, scored, patient = false, refused = () => {} }) {
    Object.assign(this, { served, levels: { ...levels }, title, scored, patient, refused });
    this.text = "";
    this.running = null;
    this.scale = h("dl", { class: "levels" });
    this.body = h("div", { class: "text", dir: "auto" });
    this.problem = h("div", { class: "problem", hidden: true });
    this.facts = h("p", { class: "facts" });
    this.element = h("article", { class: "answer", tabindex: "-1" }, this.scale, this.body, this.problem, this.facts);
    this.head();
  }

  get busy() {
    return this.running !== null;
  }

  head(achieved = {}, clamped = []) {
    this.element.setAttribute("aria-label", `${this.title} at ${spoken(this.levels)}`);
    const rows = this.served.attributes.map((a, i) => row(a, i, this.levels[a.name], achieved[a.name], clamped.includes(a.name)));
    this.scale.replaceChildren(...rows);
  }

  stop() {
    this.running?.abort();
  }

  // Ask, from the beginning. Ends whatever happens; `text` then holds what arrived.
  async run(messages) {
    this.messages = messages;
    this.running = new AbortController();
    this.element.setAttribute("aria-busy", "true");
    this.problem.hidden = true;
    this.head();
    try {
      await this.attempts(this.running.signal);
      this.failed = null;
    } catch (error) {
      this.failed = this.running.signal.aborted ? null : error;
      if (this.failed) this.show(this.failed);
      else this.facts.textContent = this.text ? "stopped" : "stopped before it began";
    } finally {
      this.running = null;
      this.element.removeAttribute("aria-busy");
    }
  }

  async attempts(signal) {
    for (let left = this.patient ? PATIENCE : 0; ; left -= 1) {
      try {
        return await this.stream(signal);
      } catch (error) {
        if (!left || this.text || !(error instanceof Problem) || !error.retryAfterS || error.retryAfterS > LONGEST_WAIT_S) throw error;
        this.facts.textContent = `the server asks to wait ${error.retryAfterS} s`;
        await pause(error.retryAfterS, signal);
      }
    }
  }

  request() {
    const { maxTokens, temperature, strategy } = state;
    const made = { model: this.served.model, messages: this.messages, control: this.levels };
    if (maxTokens !== null) made.max_tokens = maxTokens;
    if (temperature !== null) made.temperature = temperature;
    if (strategy) made.control_strategy = strategy;
    return made;
  }

  async stream(signal) {
    const begun = performance.now();
    let achieved, finish, usage, clamped = [];
    this.text = this.body.textContent = "";
    this.facts.textContent = "waiting for the first word";
    for await (const piece of answer(this.request(), signal)) {
      if (piece.levels) [this.levels, clamped] = [piece.levels, piece.clamped];
      if (piece.levels) this.head({}, clamped);
      if (piece.text) {
        this.text += piece.text;
        this.body.append(piece.text); // as text
        this.facts.textContent = "answering";
      }
      achieved = piece.achieved ?? achieved;
      finish = piece.finish ?? finish;
      usage = piece.usage ?? usage;
    }
    if (!finish) throw brokenOff();
    const seconds = ((performance.now() - begun) / 1000).toFixed(1);
    this.facts.textContent = [many(usage?.completion_tokens ?? 0, "token"), `${seconds} s`, FINISHED[finish]].filter(Boolean).join(" · ");
    await this.score(achieved, clamped, signal);
  }

  // A score that is not to be had takes nothing from the answer.
  async score(achieved, clamped, signal) {
    if (!achieved && this.scored() && this.text) {
      const about = { model: this.served.model, messages: this.messages, answer: this.text };
      try {
        achieved = await scores(about, signal);
      } catch (error) {
        if (!signal.aborted) this.facts.textContent += ` · not scored: ${error.message}`;
      }
    }
    if (achieved) this.head(achieved, clamped);
  }

  show(error) {
    const { title, message, next, status, retryAfterS } = error instanceof Problem ? error : brokenOff(error.message);
    const wait = retryAfterS ? ` The server asks to wait ${retryAfterS} s.` : "";
    const again = h("button", { type: "button", click: () => this.again() }, "Try again");
    this.facts.textContent = "";
    this.problem.replaceChildren(h("p", {}, h("b", {}, `${title}. `), message), h("p", {}, next + wait), again);
    this.problem.hidden = false;
    this.refused(status);
  }

  async again() {
    this.element.focus(); // the button is about to go
    await this.rerun(this);
  }
}
