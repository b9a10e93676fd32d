"use strict";
(() => {
  const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false, showTips: false };
  for (const box of document.querySelectorAll("[data-spec]")) {
    const spec = JSON.parse(document.getElementById(box.dataset.spec).textContent);
    const scalable = () => {
      // with a view box, the print style can scale a drawing that was made for the screen's width
      for (const svg of box.querySelectorAll("svg.main-svg")) {
        svg.setAttribute("viewBox", `0 0 ${svg.getAttribute("width")} ${svg.getAttribute("height")}`);
        svg.setAttribute("preserveAspectRatio", "xMinYMin meet");
      }
    };
    Plotly.newPlot(box, spec.data, spec.layout, config).then(() => {
      scalable();
      box.on("plotly_relayout", scalable);
      box.on("plotly_afterplot", scalable);
    });
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
