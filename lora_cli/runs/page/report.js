"use strict";
// Reads values off the charts: by pointer, or by the arrow keys on a chart that has the focus.
const charts = JSON.parse(document.getElementById("charts").textContent);

const format = (value, digits) =>
  Math.abs(value) < 0.001 && value !== 0 ? value.toExponential(digits - 2)
    : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(digits);

function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= step) low = middle; else high = middle;
  }
  return step - points[low][0] <= points[high][0] - step ? points[low] : points[high];
}

for (const figure of document.querySelectorAll(".chart")) {
  const { last, digits, lines } = charts[Number(figure.dataset.chart)];
  const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor"), out = figure.querySelector(".readout");
  const dense = lines.reduce((most, line) => (line.points.length > most.length ? line.points : most), []);
  let at = dense.length - 1;

  const show = (step) => {
    const place = nearest(dense, step);
    at = dense.indexOf(place);
    cursor.setAttribute("x1", (1000 * place[0]) / last);
    cursor.setAttribute("x2", (1000 * place[0]) / last);
    cursor.classList.add("on");
    const parts = lines.map((line) => {
      const point = nearest(line.points, place[0]);
      const elsewhere = point[0] === place[0] ? "" : ` (step ${point[0]})`;
      return `${line.name} ${format(point[1], digits)}${elsewhere}`;
    });
    out.textContent = `step ${place[0].toLocaleString("en")} · ${parts.join(" · ")}`;
  };
  const hide = () => { cursor.classList.remove("on"); out.textContent = ""; };

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    show((last * (event.clientX - box.left)) / box.width);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !dense.length) return;
    event.preventDefault();
    show(dense[Math.min(dense.length - 1, Math.max(0, at + move))][0]);
  });
}
