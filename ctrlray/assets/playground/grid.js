// Small multiples: one prompt at every level of two attributes, the others at the dial.

import { Answer } from "./answer.js";
import { dials } from "./dials.js";
import { announce, h, many, spoken } from "./dom.js";
import { follow, state } from "./link.js";

const AT_ONCE = 4;

const levelsOf = ({ low, high }) => Array.from({ length: high - low + 1 }, (_, i) => low + i);

export class Grid {
  constructor(element, session) {
    Object.assign(this, { element, session });
    this.answers = [];
    this.panel = h("div", { class: "panel" });
    this.count = h("p", { class: "hint" });
    this.place = h("div", { class: "cells", tabindex: "0", role: "region", "aria-label": "Grid of answers" });
    element.append(this.panel, this.count, this.place);
  }

  attribute(name) {
    return this.session.served.attributes.find((a) => a.name === name);
  }

  // The axes are attributes of this model, and two different ones where it has two.
  fit() {
    const names = this.session.served.attributes.map((a) => a.name);
    if (!names.includes(state.columns)) state.columns = names.find((n) => n !== state.rows);
    if (!names.includes(state.rows) || state.rows === state.columns) state.rows = names.find((n) => n !== state.columns) ?? "";
  }

  axis(title, name) {
    const options = this.session.served.attributes.map((a) => h("option", { value: a.name, selected: a.name === state[name] }, a.name));
    const other = name === "columns" ? "rows" : "columns";
    const choose = (event) => {
      if (event.target.value === state[other]) state[other] = state[name];
      state[name] = event.target.value;
      follow();
      this.draw();
      this.panel.querySelector(`select[name=${name}]`).focus();
    };
    return h("label", {}, `${title} `, h("select", { name, change: choose }, ...options));
  }

  draw() {
    this.fit();
    const { attributes } = this.session.served;
    const fixed = (a) => a.name !== state.columns && a.name !== state.rows;
    const axes = state.rows ? h("div", { class: "axes" }, this.axis("Columns", "columns"), this.axis("Rows", "rows")) : null;
    const rest = attributes.some(fixed) ? dials("The other attributes", attributes, state.levels, () => {}, fixed) : null;
    this.panel.replaceChildren(...[axes, rest].filter(Boolean));
    const size = levelsOf(this.attribute(state.columns)).length * (state.rows ? levelsOf(this.attribute(state.rows)).length : 1);
    this.count.textContent = `One prompt, ${many(size, "answer")}: one for each setting inside of your bounds.`;
  }

  cells() {
    const rows = state.rows ? levelsOf(this.attribute(state.rows)) : [null];
    const columns = levelsOf(this.attribute(state.columns));
    const { served, scored, refused } = this.session;
    return rows.map((row) =>
      columns.map((column) => {
        const levels = { ...state.levels, [state.columns]: column, ...(row === null ? {} : { [state.rows]: row }) };
        const made = new Answer({ served, levels, title: "Answer", scored, refused, patient: true });
        made.rerun = () => this.session.track(() => made.run(made.messages));
        made.body.setAttribute("tabindex", "0"); // long ones scroll
        return made;
      }),
    );
  }

  table(prompt, cells) {
    const head = levelsOf(this.attribute(state.columns)).map((l) => h("th", { scope: "col" }, `${state.columns} ${l}`));
    const rows = state.rows ? levelsOf(this.attribute(state.rows)) : [null];
    const body = cells.map((answers, i) =>
      h("tr", {}, state.rows ? h("th", { scope: "row" }, h("span", {}, `${state.rows} ${rows[i]}`)) : null, ...answers.map((a) => h("td", {}, a.element))),
    );
    const caption = h("caption", {}, h("span", { dir: "auto" }, prompt));
    this.place.style.setProperty("--columns", head.length);
    return h("table", {}, caption, h("thead", {}, h("tr", {}, state.rows ? h("td", {}) : null, ...head)), h("tbody", {}, ...body));
  }

  async ask(prompt) {
    const cells = this.cells();
    this.answers = cells.flat();
    this.stopped = false;
    this.place.replaceChildren(this.table(prompt, cells));
    announce(`Asking for ${many(this.answers.length, "answer")}`);
    const system = state.system.trim() ? [{ role: "system", content: state.system }] : [];
    const messages = [...system, { role: "user", content: prompt }];
    const waiting = [...this.answers];
    for (const a of waiting) a.facts.textContent = "in the queue";
    const work = async () => {
      for (let next = waiting.shift(); next && !this.stopped; next = waiting.shift()) {
        await next.run(messages);
        if ([401, 404].includes(next.failed?.status)) this.stop(); // the others would fail alike
      }
    };
    await Promise.all(Array.from({ length: Math.min(AT_ONCE, this.session.concurrent ?? AT_ONCE) }, work));
    this.tell();
  }

  tell() {
    if (!this.answers.length) return; // forgotten while they were answered
    for (const a of this.answers) if (a.facts.textContent === "in the queue") a.facts.textContent = "not asked";
    const failed = this.answers.filter((a) => a.failed);
    const there = this.answers.filter((a) => a.text && !a.failed).length;
    const trouble = failed.length ? ` ${failed.length} failed, the first at ${spoken(failed[0].levels)}: ${failed[0].failed.message}` : "";
    announce(`${there} of ${many(this.answers.length, "answer")} are there.${trouble}`);
  }

  forget() {
    this.stop();
    this.answers = [];
    this.place.replaceChildren();
  }

  stop() {
    this.stopped = true;
    for (const a of this.answers) a.stop();
  }
}
