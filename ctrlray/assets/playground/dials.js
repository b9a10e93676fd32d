// Sliders: one for each attribute, between the levels that the caller may set.

import { h } from "./dom.js";
import { follow } from "./link.js";

const TONES = 6;
export const tone = (index) => `tone-${index % TONES}`;

const bounds = (attribute) => {
  const { low, high, levels } = attribute;
  if (low === high) return `Your key allows ${low} only, of ${levels} levels.`;
  return low > 1 || high < levels ? `Your key allows ${low} to ${high} of ${levels} levels.` : "";
};

let made = 0;

const dial = (attribute, index, levels, changed) => {
  const id = `dial-${(made += 1)}`;
  const { name, low, high } = attribute;
  const value = h("output", { for: id }, "");
  const note = bounds(attribute);
  const slider = h("input", { id, type: "range", min: low, max: high, step: 1, disabled: low === high, "data-attribute": name, "aria-describedby": note && `${id}-note` });
  const show = () => {
    slider.setAttribute("aria-valuetext", `${slider.value} of ${attribute.levels}`);
    slider.style.setProperty("--filled", low === high ? "100%" : `${(100 * (slider.value - low)) / (high - low)}%`);
    value.textContent = slider.value;
  };
  const set = (level) => {
    slider.value = level;
    levels[name] = Number(slider.value);
    show();
    changed();
  };
  slider.value = levels[name];
  slider.addEventListener("input", () => set(slider.value));
  show();
  const steps = Array.from({ length: high - low + 1 }, (_, i) => low + i);
  const scale = h("div", { class: "scale", "aria-hidden": "true" }, ...steps.map((l) => h("span", { click: () => slider.disabled || set(l) }, String(l))));
  return h(
    "div",
    { class: `dial ${tone(index)}` },
    h("label", { for: id }, name),
    value,
    slider,
    scale,
    note ? h("p", { class: "hint", id: `${id}-note` }, note) : null,
  );
};

// A fieldset of sliders which writes into `levels`. `only` says which attributes it is for.
export const dials = (title, attributes, levels, changed = () => {}, only = () => true) => {
  const told = () => {
    follow();
    changed();
  };
  const shown = attributes.map((a, i) => (only(a) ? dial(a, i, levels, told) : null));
  return h("fieldset", { class: "dials" }, h("legend", {}, title), ...shown);
};

// Levels inside of the bounds, the default where none is given; what had to move is named.
export const fit = (attributes, levels) => {
  const moved = [];
  const fitted = {};
  for (const { name, low, high, default: usual } of attributes) {
    const wanted = levels[name] ?? usual;
    fitted[name] = Math.min(Math.max(wanted, low), high);
    if (fitted[name] !== wanted) moved.push(`${name} ${wanted} is now ${fitted[name]}`);
  }
  return { levels: fitted, moved };
};
