/* Draws the book's plotly figures: plotly.js comes from the site's own root, once, when a figure comes near the
   screen. Until then, and wherever JavaScript is off, the still twin stands in its place. */
(function () {
  if (window.nsmFigures) return window.nsmFigures();
  const root = () => document.documentElement.dataset.content_root || "./";
  let loading = null;

  function plotly() {
    if (window.Plotly) return Promise.resolve(window.Plotly);
    loading = loading || new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = root() + "plotly.min.js";
      script.onload = () => resolve(window.Plotly);
      script.onerror = reject;
      document.head.append(script);
    });
    return loading;
  }

  function themed(layout) {
    const style = getComputedStyle(document.body);
    const ink = style.color, grid = style.getPropertyValue("--nsm-grid").trim() || "#c7c8c9";
    const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: ink, tickcolor: ink, automargin: true };
    const result = Object.assign({}, layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: Object.assign({}, layout.font, { color: ink, family: style.fontFamily }),
    });
    delete result.width;
    for (const key of new Set(["xaxis", "yaxis", ...Object.keys(layout)]))
      if (/^[xy]axis\d*$/.test(key)) result[key] = Object.assign({}, axis, layout[key]);
    return result;
  }

  function chosen(figure) {
    return [...figure.querySelectorAll("[data-control]")].map((input) => input.value).join(",");
  }

  async function draw(figure) {
    const data = figure.nsmData || (figure.nsmData = JSON.parse(figure.querySelector(".nsm-data").textContent));
    const live = figure.querySelector(".nsm-live"), Plotly = await plotly();
    const changes = data.frames[chosen(figure)] || [];
    const traces = data.figure.data.map((trace, i) => Object.assign({}, trace, changes[i]));
    const layout = Object.assign({}, data.figure.layout, changes[traces.length]);  // one change more is the layout's
    live.classList.add("nsm-drawn");
    figure.querySelector(".nsm-still").classList.add("nsm-replaced");
    await Plotly.react(live, traces, themed(layout), { responsive: true, displayModeBar: false });
    if (figure.nsmLinks) return;
    figure.nsmLinks = true;
    live.on("plotly_click", (event) => {  // the point of a sweep: its notebook, or its line in the table
      const there = event.points[0].customdata;
      if (typeof there !== "string" || !/^(#|\.\.\/sweeps\/)[\w./-]+$/.test(there)) return;
      const fold = there[0] === "#" && document.getElementById(there.slice(1));
      if (fold) fold.closest("details").open = true;
      location.href = there;
    });
  }

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "400px" });

  function start() {
    for (const figure of document.querySelectorAll(".nsm-figure:not(.nsm-ready)")) {
      figure.classList.add("nsm-ready");
      if (!figure.querySelector(".nsm-data")) continue;
      for (const input of figure.querySelectorAll("[data-control]"))
        input.addEventListener("input", () => {
          const output = input.parentElement.querySelector("output");
          if (output) {
            const words = JSON.parse(input.dataset.choices)[input.value];
            output.textContent = words;
            input.setAttribute("aria-valuetext", words);
          }
          draw(figure);
        });
      near.observe(figure);
    }
  }

  window.nsmFigures = start;
  new MutationObserver(() => {
    for (const live of document.querySelectorAll(".nsm-drawn")) draw(live.closest(".nsm-figure"));
  }).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
