"use strict";
(() => {
  const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false, showTips: false };

  const save = (name, kind, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: kind }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const button = (label, what, run) => {
    const made = document.createElement("button");
    made.type = "button";
    made.className = "save";
    made.textContent = label;
    made.setAttribute("aria-label", `Save ${what} as ${label}`);
    made.addEventListener("click", run);
    return made;
  };
  const saves = (...buttons) => {
    const row = document.createElement("span");
    row.className = "saves";
    row.append(...buttons);
    return row;
  };
  const fileName = (element, title) => {
    const section = element.closest("section[aria-labelledby]")?.getAttribute("aria-labelledby") ?? "page";
    return `${section}-${title.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 48)}`.replace(/-+$/, "");
  };

  const quoted = (value) => {
    let text = String(value ?? "");
    if (typeof value === "string" && /^[=+@\t-]/.test(text)) text = `'${text}`; // a spreadsheet would run it
    return /[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  const csv = (rows) => rows.map((row) => row.map(quoted).join(",") + "\n").join("");
  const csvButton = (holder, title) => {
    const rows = JSON.parse(holder.querySelector("script.rows").textContent);
    return button("CSV", title, () => save(`${fileName(holder, title)}.csv`, "text/csv", csv(rows)));
  };

  for (const figure of document.querySelectorAll("figure")) {
    const box = figure.querySelector(".plot");
    const spec = JSON.parse(figure.querySelector("script.spec").textContent);
    const caption = figure.querySelector("figcaption");
    const title = caption.querySelector("span").textContent;
    const scalable = () => {
      // with a view box, the print style can scale a drawing that was made for the screen's width
      for (const svg of box.querySelectorAll("svg.main-svg")) {
        svg.setAttribute("viewBox", `0 0 ${svg.getAttribute("width")} ${svg.getAttribute("height")}`);
        svg.setAttribute("preserveAspectRatio", "xMinYMin meet");
      }
    };
    const drawing = async () => {
      const address = await Plotly.toImage(box, { format: "svg", width: box.clientWidth || 640, height: box.clientHeight || 400 });
      save(`${fileName(figure, title)}.svg`, "image/svg+xml", decodeURIComponent(address.slice(address.indexOf(",") + 1)));
    };
    const buttons = [button("SVG", title, drawing)];
    if (figure.querySelector("script.rows")) buttons.push(csvButton(figure, title));
    caption.append(saves(...buttons));
    Plotly.newPlot(box, spec.data, spec.layout, config).then(() => {
      scalable();
      box.on("plotly_relayout", scalable);
      box.on("plotly_afterplot", scalable);
    });
  }

  for (const holder of document.querySelectorAll(".scroll")) {
    const caption = holder.querySelector("caption > span");
    caption.append(saves(csvButton(holder, caption.textContent)));
  }

  const form = document.getElementById("filter");
  if (form) {
    const wanted = (by) => [...form.querySelectorAll(`[data-by=${by}]`)];
    const apply = () => {
      const [method] = wanted("method").map((s) => s.value);
      const levels = wanted("level").map((s) => s.value);
      const words = wanted("text").map((s) => s.value.trim().toLowerCase())[0];
      let shown = 0;
      for (const prompt of document.querySelectorAll("section.prompt")) {
        const asked = prompt.querySelector("h3").textContent.toLowerCase().includes(words);
        for (const group of prompt.querySelectorAll("details[data-method]")) {
          for (const answer of group.querySelectorAll("article")) {
            const at = answer.dataset.levels?.split(","); // none: an answer that was given to no setting
            const fits = levels.every((level, i) => !level || !at || level === at[i]) && (!method || method === group.dataset.method);
            answer.hidden = !(fits && (asked || answer.textContent.toLowerCase().includes(words)));
            shown += answer.hidden ? 0 : 1;
          }
          group.hidden = !group.querySelector("article:not([hidden])");
          if (!group.hidden && (method || words)) group.open = true;
        }
        prompt.hidden = !prompt.querySelector("details:not([hidden])");
      }
      form.querySelector("output").textContent = `${shown} answers`;
    };
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    apply();
  }

  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open], .numbers, .prompt > *)")]; // samples stay as the reader left them
    for (const d of folded) d.open = true;
  });
  addEventListener("afterprint", () => {
    for (const d of folded) d.open = false;
  });
})();
