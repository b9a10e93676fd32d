// Elements and announcements. Text is only ever set as text: nothing here takes markup.

export const $ = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

const fill = (made, given, children) => {
  for (const [name, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") made.addEventListener(name, value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((c) => c !== null));
  return made;
};

// h("button", { type: "button", click: stop }, "Stop"): functions become listeners, everything else attributes
export const h = (tag, given = {}, ...children) => fill(document.createElement(tag), given, children);
export const svg = (tag, given = {}, ...children) => fill(document.createElementNS(SVG, tag), given, children);

// what is seen and not read, and what is read and not seen
export const seen = (text) => h("span", { "aria-hidden": "true" }, text);
export const unseen = (text) => h("span", { class: "unseen" }, text);

// Said by screen readers when they have time. Streams are not announced word by word: their end is.
export const announce = (text) => {
  $("announce").textContent = text;
};

export const notice = (text) => {
  $("notice").textContent = text;
  $("notice").hidden = !text;
};

export const many = (count, one, more = `${one}s`) => `${count} ${count === 1 ? one : more}`;

export const spoken = (levels) => Object.entries(levels).map(([name, level]) => `${name} ${level}`).join(", ");
