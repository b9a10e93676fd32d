"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const study = document.body.dataset.study;
  const items = [...document.querySelectorAll("article")];
  const names = [...items[0].querySelectorAll("fieldset")].map((f) => f.dataset.attribute);
  const values = ["A", "B", "tie", "skip"];
  const prefix = `ctrlray-study:${study}:`;
  let rater = "";
  let answers = {}; // item -> attribute -> value
  let at = 0;

  const warn = (text) => {
    $("notice").textContent = text;
    $("notice").hidden = !text;
  };
  const read = (key) => {
    try {
      return JSON.parse(localStorage.getItem(prefix + key));
    } catch {
      return null;
    }
  };
  const write = (key, value) => {
    try {
      localStorage.setItem(prefix + key, JSON.stringify(value));
      return true;
    } catch {
      warn("This browser does not let the page keep your choices. Download your file before you close it.");
      return false;
    }
  };
  const raters = () => read("raters") || [];
  const radios = (item, name) => [...item.querySelectorAll("input")].filter((i) => i.name === `${item.id}-${name}`);
  const chosen = (item, name) => (answers[item.id] || {})[name];
  const complete = (item) => names.every((n) => chosen(item, n));

  // only what this study can hold: a file or an older page may say anything
  const clean = (given) => {
    const kept = {};
    for (const item of items) {
      for (const name of names) {
        const value = given && typeof given === "object" && given[item.id] ? given[item.id][name] : null;
        if (values.includes(value)) (kept[item.id] ||= {})[name] = value;
      }
    }
    return kept;
  };

  const status = () => {
    const done = items.filter(complete).length;
    const left = items.length - done;
    $("done").value = done;
    $("status").textContent = `${rater}: ${done} of ${items.length} pairs done`;
    $("left").textContent = left ? `${left} ${left === 1 ? "pair is" : "pairs are"} open. You can download what you have at any time.` : "All pairs are done. Thank you.";
    $("open").disabled = !left;
  };
  const draw = () => {
    for (const item of items) {
      for (const name of names) {
        for (const radio of radios(item, name)) radio.checked = radio.value === chosen(item, name);
      }
    }
    status();
  };
  const show = (index, focus = true) => {
    at = Math.max(0, Math.min(items.length - 1, index));
    items.forEach((item, i) => (item.hidden = i !== at));
    $("previous").disabled = at === 0;
    $("next").disabled = at === items.length - 1;
    if (focus) {
      scrollTo(0, $("work").offsetTop);
      items[at].querySelector("h2").focus({ preventScroll: true });
    }
  };
  const nextOpen = (from) => {
    const order = items.map((_, i) => (from + i) % items.length);
    return order.find((i) => !complete(items[i]));
  };
  // the tab's history keeps a second copy: of a page opened as a file, a browser may start a load with an empty storage of its own
  const note = () => {
    try {
      history.replaceState({ rater, answers }, "");
    } catch {
      // too many choices in too little time; the next one takes these along
    }
  };
  const keep = () => {
    note();
    write(`answers:${rater}`, answers);
  };
  const kept = (name) => {
    const noted = history.state?.rater === name ? clean(history.state.answers) : {};
    const stored = clean(read(`answers:${name}`));
    for (const id of Object.keys(stored)) noted[id] = { ...noted[id], ...stored[id] };
    return noted;
  };
  const choose = (item, name, value) => {
    (answers[item.id] ||= {})[name] = value;
    keep();
    draw();
  };

  const begin = (name, focus = true) => {
    rater = name;
    answers = kept(rater);
    keep();
    if (!raters().includes(rater)) write("raters", [...raters(), rater]);
    write("last", rater);
    $("who").hidden = true;
    $("work").hidden = false;
    $("help").open = Object.keys(answers).length === 0;
    draw();
    show(nextOpen(0) ?? 0, focus);
  };
  const ask = () => {
    $("known").replaceChildren(...raters().map((r) => Object.assign(document.createElement("option"), { value: r })));
    $("rater").value = "";
    $("who").hidden = false;
    $("work").hidden = true;
    $("rater").focus();
  };

  const download = (text, type, ending) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = `ratings-${study}-${rater.replace(/[^\w-]+/g, "_")}.${ending}`;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
  const asCsv = () => {
    const rows = items.map((i) => [study, rater, i.id, ...names.map((n) => chosen(i, n) || "")]);
    return [["study", "rater", "item_id", ...names], ...rows].map((r) => r.map(quoted).join(",")).join("\r\n") + "\r\n";
  };

  $("who").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = $("rater").value.trim();
    if (name) begin(name);
  });
  $("work").addEventListener("change", (event) => {
    const set = event.target.closest("fieldset");
    if (set) choose(event.target.closest("article"), set.dataset.attribute, event.target.value);
  });
  $("previous").addEventListener("click", () => show(at - 1));
  $("next").addEventListener("click", () => show(at + 1));
  $("open").addEventListener("click", () => show(nextOpen(at + 1) ?? at));
  $("csv").addEventListener("click", () => download(asCsv(), "text/csv", "csv"));
  $("json").addEventListener("click", () => download(JSON.stringify({ study, rater, answers }, null, 1), "application/json", "json"));
  $("change").addEventListener("click", ask);
  $("clear").addEventListener("click", () => {
    if (!confirm(`Delete the choices of ${rater} in this browser?`)) return;
    answers = {};
    keep();
    draw();
    show(0);
  });
  $("file").addEventListener("change", async () => {
    const [file] = $("file").files;
    $("file").value = "";
    if (!file) return;
    let given = null;
    try {
      given = JSON.parse(await file.text());
    } catch {
      given = null;
    }
    if (!given || given.study !== study) return warn(`${file.name} is no json file of this study.`);
    const found = clean(given.answers);
    for (const id of Object.keys(found)) answers[id] = { ...found[id], ...answers[id] }; // what was chosen here stays
    keep();
    warn("");
    draw();
    show(nextOpen(0) ?? at);
  });
  addEventListener("storage", (event) => {
    // the same rater in another tab
    if (rater && event.key === `${prefix}answers:${rater}`) {
      answers = clean(read(`answers:${rater}`));
      note();
      draw();
    }
  });
  addEventListener("keydown", (event) => {
    const typing = event.target.matches("#rater, input[type=file]");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || $("work").hidden || !$("use-keys").checked) return;
    const key = event.key.toLowerCase();
    const value = { a: "A", b: "B", t: "tie", s: "skip" }[key];
    const name = value && names.find((n) => !chosen(items[at], n));
    if (name) choose(items[at], name, value);
    if (key === "n") show(at + 1);
    if (key === "p") show(at - 1);
  });

  show(0, false);
  const last = history.state?.rater ?? read("last");
  if (typeof last === "string" && last) begin(last, false);
})();
