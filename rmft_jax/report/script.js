"use strict";
// Definitions open when a link leads to them. Charts tell their points to pointer and arrow keys; a legend entry hides its run.
(() => {
  const open = (hash) => {
    const target = document.getElementById(decodeURIComponent(hash.slice(1)));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", () => open(location.hash));
  open(location.hash);
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (link) open(link.hash);
  });

  const STEPS = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
  const within = (index, list) => Math.max(0, Math.min(index, list.length - 1));

  for (const figure of document.querySelectorAll(".plots figure")) {
    const svg = figure.querySelector("svg.chart");
    const said = figure.querySelector(".said");
    const runs = [...svg.querySelectorAll("g.run")].sort((a, b) => a.dataset.slot - b.dataset.slot);
    const lines = () =>
      runs.filter((run) => !run.classList.contains("off")).map((run) => [...run.querySelectorAll("circle")])
        .filter((points) => points.length);
    const first = figure === document.querySelector(".plots figure");
    const hint = first ? "Point at a chart, or press arrow keys in it, to read its values; a name in a legend hides its line." : "";
    let current = null;

    const tell = (point) => {
      if (current) current.classList.remove("at");
      current = point;
      if (point) point.classList.add("at");
      said.textContent = point ? point.querySelector("title").textContent : hint;
    };
    said.textContent = hint;
    svg.setAttribute("tabindex", "0");

    svg.addEventListener("pointermove", (event) => {
      let best = null, least = 40 ** 2;
      for (const point of lines().flat()) {
        const box = point.getBoundingClientRect();
        const distance = (box.x + box.width / 2 - event.clientX) ** 2 + (box.y + box.height / 2 - event.clientY) ** 2;
        if (distance < least) [best, least] = [point, distance];
      }
      if (best && best !== current) tell(best);
    });
    svg.addEventListener("keydown", (event) => {
      const step = STEPS[event.key], shown = lines();
      if (!step || !shown.length) return;
      event.preventDefault();
      const row = shown.findIndex((points) => points.includes(current));
      if (row < 0) return tell(shown[0][0]);
      const next = shown[within(row + step[0], shown)];
      tell(next[within(shown[row].indexOf(current) + step[1], next)]);
    });

    for (const button of figure.querySelectorAll(".legend button")) {
      button.disabled = false;
      button.addEventListener("click", () => {
        const run = runs.find((one) => one.dataset.slot === button.dataset.slot);
        if (!run) return;
        const off = run.classList.toggle("off");
        button.setAttribute("aria-pressed", String(!off));
        if (off && current && run.contains(current)) tell(null);
      });
    }
  }
})();
