// Conversations: one in the chat, two beside each other in the comparison, each with a dial of its own.

import { Answer } from "./answer.js";
import { dials } from "./dials.js";
import { announce, h } from "./dom.js";
import { state } from "./link.js";

class Lane {
  // `levels` names the part of the state that its dial sets
  constructor(title, levels, session) {
    Object.assign(this, { title, levels, session });
    this.turns = []; // { prompt, answer }
    this.list = h("ol", { class: "turns", "aria-label": `${title}: conversation` });
    this.empty = h("p", { class: "empty" });
    this.panel = h("div", { class: "panel" });
    this.element = h("div", { class: "lane" }, this.panel, h("div", { class: "talk" }, this.empty, this.list));
  }

  draw() {
    const last = () => {
      const turn = this.turns.at(-1);
      const moved = () => Object.entries(state[this.levels]).some(([name, level]) => turn.answer.levels[name] !== level);
      this.redo.hidden = !turn || (turn.answer.served.model === this.session.served.model && !moved());
    };
    this.redo = h("button", { type: "button", hidden: true, click: () => this.session.busy || this.turns.at(-1).answer.again() }, "Answer again at this setting");
    this.panel.replaceChildren(dials(this.title, this.session.served.attributes, state[this.levels], last), this.redo);
    this.empty.textContent = this.session.inviting;
    last();
  }

  // what the model is sent: turns that came to something, and the new one
  messages(prompt, before = this.turns) {
    const system = state.system.trim() ? [{ role: "system", content: state.system }] : [];
    const turns = before.filter((t) => t.answer.text && !t.answer.failed);
    const said = turns.flatMap((t) => [{ role: "user", content: t.prompt }, { role: "assistant", content: t.answer.text }]);
    return [...system, ...said, { role: "user", content: prompt }];
  }

  async ask(prompt) {
    const messages = this.messages(prompt);
    const answer = this.session.answer(this.title, state[this.levels]);
    answer.rerun = () => this.session.track(() => this.reanswer(answer));
    this.turns.push({ prompt, answer });
    const said = h("div", { class: "said", dir: "auto" });
    said.textContent = prompt;
    this.list.append(h("li", {}, h("h2", { class: "unseen" }, "You"), said, answer.element));
    this.empty.hidden = true;
    said.scrollIntoView({ block: "start" }); // with room below for the answer
    this.redo.hidden = true;
    await answer.run(messages);
  }

  // the same prompt once more, to the model and at the dial as they are now
  async reanswer(answer) {
    const index = this.turns.findIndex((t) => t.answer === answer);
    Object.assign(answer, { served: this.session.served, levels: { ...state[this.levels] } });
    this.redo.hidden = true;
    await answer.run(this.messages(this.turns[index].prompt, this.turns.slice(0, index)));
  }

  clear() {
    this.turns = [];
    this.list.replaceChildren();
    this.empty.hidden = false;
  }
}

// A view of one lane or several, which are all asked the same.
class Lanes {
  constructor(element, session, lanes, { patient = false, inviting }) {
    Object.assign(this, { element, session, patient, inviting });
    this.lanes = lanes.map(([title, levels]) => new Lane(title, levels, this));
    this.fresh = h("button", { type: "button", class: "quiet", hidden: true, click: () => this.clear() }, "New conversation");
    element.append(h("div", { class: "lanes" }, ...this.lanes.map((l) => l.element)), this.fresh);
  }

  get served() {
    return this.session.served;
  }

  get busy() {
    return this.session.busy;
  }

  answer(title, levels) {
    const { served, scored, refused } = this.session;
    return new Answer({ served, levels, title, scored, refused, patient: this.patient });
  }

  track(work) {
    return this.session.track(async () => {
      await work();
      this.tell();
    });
  }

  draw() {
    for (const lane of this.lanes) lane.draw();
  }

  async ask(prompt) {
    this.fresh.hidden = false;
    announce("Answering");
    await Promise.all(this.lanes.map((lane) => lane.ask(prompt)));
    this.tell();
  }

  tell() {
    const last = this.lanes.map((l) => l.turns.at(-1)?.answer).filter(Boolean);
    if (!last.length) return; // forgotten while it was answered
    announce(last.map((a) => (a.failed ? `${a.title}: ${a.problem.innerText}` : `${a.title}: ${a.text} (${a.facts.textContent})`)).join(". "));
  }

  stop() {
    for (const { turns } of this.lanes) for (const turn of turns) turn.answer.stop();
  }

  // what was said is no longer here; also when somebody else comes
  forget() {
    this.stop();
    for (const lane of this.lanes) lane.clear();
    this.fresh.hidden = true;
  }

  clear() {
    this.forget();
    announce("New conversation");
    this.session.focus();
  }
}

export const chat = (element, session) =>
  new Lanes(element, session, [["Dial", "levels"]], { inviting: "Set the dial, then ask. The dial may be turned between answers." });

export const compare = (element, session) =>
  new Lanes(element, session, [["Setting A", "levels"], ["Setting B", "other"]], {
    patient: true,
    inviting: "Both settings are asked the same.",
  });
