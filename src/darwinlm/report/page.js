"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  // Without the bar of buttons, one of which sends a chart to a server.
  const settings = { responsive: true, displayModeBar: false };
  // A finger that moves scrolls the page; a mouse zooms, and a double click goes back.
  const dragmode = matchMedia("(hover: hover)").matches ? "zoom" : false;
  const nodes = Object.keys(charts).map((name) => document.getElementById(name));
  for (const node of nodes) {
    const { data, layout } = charts[node.id];
    Plotly.newPlot(node, data, { ...layout, dragmode }, settings);
  }
  // A page of paper is narrower than most windows, and is laid out after this event.
  const width = (node) => (node.closest(".charts") ? 310 : 640);
  const resize = (wanted) => nodes.forEach((node) => Plotly.relayout(node, wanted(node)));
  addEventListener("beforeprint", () => resize((node) => ({ autosize: false, width: width(node) })));
  addEventListener("afterprint", () => resize(() => ({ autosize: true, width: null })));
})();
