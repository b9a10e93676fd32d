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
  const fileName = (title) => title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60) || "figure";

  const quoted = (value) => {
    let text = String(value ?? "").replace(/<br>/g, " ").replace(/\u2212/g, "-");
    if (/^[=+@\t]/.test(text)) text = `'${text}`; // a spreadsheet would run it
    return /[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  const csv = (rows) => rows.map((row) => row.map(quoted).join(",")).join("\n") + "\n";
  const pointsOf = (trace) => {
    if (trace.type === "heatmap") {
      const cells = trace.y.flatMap((y, i) => trace.x.map((x, j) => [x, y, trace.z[i][j], trace.text?.[i]?.[j]]));
      return cells.map(([x, y, z, text]) => ["", x, y, z, "", "", text]);
    }
    const error = trace.error_y ?? {};
    const bound = (side, i, sign) => (error[side] ? trace.y[i] + sign * error[side][i] : "");
    const extra = (i) => [trace.customdata?.[i] ?? ""].flat().join(" ");
    return trace.x.map((x, i) => [trace.name, x, trace.y[i], "", bound("arrayminus", i, -1), bound("array", i, 1), extra(i)]);
  };
  const tableOf = (spec) => {
    const title = (axis) => spec.layout[axis]?.title?.text ?? axis[0];
    const shown = spec.data.filter((trace) => trace.hoverinfo !== "skip");
    return [["series", title("xaxis"), title("yaxis"), "value", "low", "high", "note"], ...shown.flatMap(pointsOf)];
  };

  for (const box of document.querySelectorAll("[data-spec]")) {
    const spec = JSON.parse(document.getElementById(box.dataset.spec).textContent);
    const caption = box.parentElement.querySelector("figcaption");
    const title = caption.firstChild.textContent.trim();
    const table = csv(tableOf(spec));
    const scalable = () => {
      // with a view box, the print style can scale a drawing that was made for the screen's width
      for (const svg of box.querySelectorAll("svg.main-svg")) {
        svg.setAttribute("viewBox", `0 0 ${svg.getAttribute("width")} ${svg.getAttribute("height")}`);
        svg.setAttribute("preserveAspectRatio", "xMinYMin meet");
      }
    };
    const drawing = async () => {
      const address = await Plotly.toImage(box, { format: "svg", width: box.clientWidth || 640, height: box.clientHeight || 400 });
      save(`${fileName(title)}.svg`, "image/svg+xml", decodeURIComponent(address.slice(address.indexOf(",") + 1)));
    };
    caption.append(
      saves(button("SVG", title, drawing), button("CSV", title, () => save(`${fileName(title)}.csv`, "text/csv", table))),
    );
    Plotly.newPlot(box, spec.data, spec.layout, config).then(() => {
      scalable();
      box.on("plotly_relayout", scalable);
      box.on("plotly_afterplot", scalable);
    });
  }

  for (const table of document.querySelectorAll(".scroll > table")) {
    const title = table.caption.textContent.trim();
    const text = (cell) => cell.innerText.replace(/\s+/g, " ").trim();
    const read = () => csv([...table.rows].filter((r) => r.className !== "groups").map((r) => [...r.cells].map(text)));
    table.caption.append(saves(button("CSV", title, () => save(`${fileName(title)}.csv`, "text/csv", read()))));
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
    folded = [...document.querySelectorAll("details:not([open], .numbers)")];
    for (const d of folded) d.open = true;
  });
  addEventListener("afterprint", () => {
    for (const d of folded) d.open = false;
  });
})();
