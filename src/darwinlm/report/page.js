"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const settings = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  const nodes = Object.keys(charts).map((name) => document.getElementById(name));
  for (const node of nodes) Plotly.newPlot(node, charts[node.id].data, charts[node.id].layout, settings);
  // A page of paper is narrower than most windows, and is laid out after this event.
  const paper = 640;
  const resize = (wanted) => nodes.forEach((node) => Plotly.relayout(node, wanted(node)));
  addEventListener("beforeprint", () => resize((node) => ({ autosize: false, width: Math.min(node.clientWidth, paper) })));
  addEventListener("afterprint", () => resize(() => ({ autosize: true, width: null })));
})();
