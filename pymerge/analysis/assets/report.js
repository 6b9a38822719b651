// Draws the plots of the report from the numbers in the element "data", in the page's colours.
(() => {
  "use strict";

  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const element = (id) => document.getElementById(id);
  // Plotly reads labels as a kind of HTML.
  const clean = (text) =>
    String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text, length) => {
    const whole = String(text);
    const end = Math.floor((length - 1) / 2);
    return clean(whole.length <= length ? whole
      : whole.slice(0, length - 1 - end) + "\u2026" + whole.slice(whole.length - end));
  };
  // Labels on axes: shortened, and still different from one another.
  function axis(names, length) {
    const seen = new Set();
    return names.map((name, number) => {
      let label = short(name, length);
      while (seen.has(label)) label += ` (${number + 1})`;
      seen.add(label);
      return label;
    });
  }
  const models = axis(data.models, 24);
  // Okabe and Ito's colours, which most people can distinguish; a ninth model gets another dash.
  const palettes = {
    light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#5b3fa8", "#555555"],
    dark: ["#5ab4f0", "#ff8f45", "#35c79a", "#e59ac4", "#e0b53a", "#8fd3ff", "#a98ff0", "#bbbbbb"],
  };
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const dark = () => root.dataset.theme === "dark";
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const line = (number) => ({
    color: palettes[dark() ? "dark" : "light"][number % 8],
    dash: dashes[Math.floor(number / 8) % 4],
    width: 1.8,
  });
  const scales = {
    signed: () => (dark()
      ? [[0, "#4f9dff"], [0.5, "#1f2630"], [1, "#ff8a5c"]]
      : [[0, "#2166ac"], [0.5, "#f7f7f7"], [1, "#b2182b"]]),
    plain: () => (dark()
      ? [[0, "#1b2430"], [0.5, "#2f6f9f"], [1, "#b9e6ff"]]
      : [[0, "#f3f7fb"], [0.5, "#6aaed6"], [1, "#08306b"]]),
  };

  function layout(more) {
    const ink = colour("--ink");
    const grid = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, size: 12, family: "system-ui, sans-serif" },
      margin: { l: 60, r: 20, t: 30, b: 48 },
      modebar: {
        bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent"),
      },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: ink } },
      legend: { orientation: "h", y: -0.22, font: { size: 11 } },
      colorway: palettes[dark() ? "dark" : "light"],
      ...more,
      xaxis: { ...grid, ...(more.xaxis || {}) },
      yaxis: { ...grid, ...(more.yaxis || {}) },
    };
  }
  const config = {
    responsive: true, displaylogo: false,
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
  };

  const charts = [];
  function draw(id, make) {
    if (!element(id)) return;
    const redraw = () => {
      const { traces, about, ...more } = make();
      if (about) element(id).setAttribute("aria-label", about);
      if (about) element(id).removeAttribute("aria-labelledby");
      return Plotly.react(id, traces, layout(more), config);
    };
    charts.push(redraw);
  }
  // Fills a selection; the charts that depend on it are drawn again when it changes.
  function select(id, labels) {
    const list = element(id);
    if (!list) return;
    labels.forEach((label, number) => list.add(new Option(label, String(number))));
    list.addEventListener("change", drawAll);
  }
  const chosen = (id) => Number(element(id).value || 0);
  const drawAll = () => Promise.all(charts.map((redraw) => redraw()));

  const finite = (values) => values.flat(2).filter((value) => value !== null);
  const text = (value) => (value === null ? "not defined" : Number(value.toPrecision(3)).toString());
  function span(values) {
    const found = finite(values);
    if (!found.length) return "no values";
    let low = found[0];
    let high = found[0];
    for (const value of found) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    return `from ${text(low)} to ${text(high)}`;
  }

  function heat(z, x, y, signed, label, more) {
    const largest = Math.max(1e-12, ...finite(z).map(Math.abs));
    const cells = z.length * (z[0] || []).length;
    return {
      type: "heatmap", z, x, y, xgap: cells > 2000 ? 0 : 1, ygap: cells > 2000 ? 0 : 1,
      colorscale: signed ? scales.signed() : scales.plain(),
      ...(signed ? { zmin: -largest, zmax: largest } : {}),
      colorbar: { thickness: 12, outlinewidth: 0, title: { text: clean(label), side: "right" } },
      hovertemplate: "%{y}, %{x}: %{z:.4g}<extra></extra>", hoverongaps: false,
      ...more,
    };
  }
  const category = { type: "category", showgrid: false, zeroline: false };
  const reversed = { ...category, autorange: "reversed" };

  // Pairs of models
  select("pairs-statistic", data.pairs.statistics.map((one) => one.label));
  select("pairs-place", data.pairs.places);
  draw("pairs", () => {
    const number = chosen("pairs-statistic");
    const statistic = data.pairs.statistics[number];
    const values = data.pairs.values[chosen("pairs-place")][number];
    const count = models.length;
    const z = models.map(() => new Array(count).fill(null));
    let next = 0;
    for (let i = 0; i < count; i += 1) {
      for (let j = i + 1; j < count; j += 1) z[i][j] = z[j][i] = values[next++];
    }
    const place = data.pairs.places[chosen("pairs-place")];
    const written = count <= 12 ? { texttemplate: "%{z:.3g}", textfont: { size: 11 } } : {};
    return {
      traces: [heat(z, models, models, statistic.signed, statistic.label, written)],
      xaxis: category, yaxis: reversed,
      about: `Heat map of ${statistic.label} between models, ${place}: ${span([values])}.`
        + " The numbers of the whole model are in the table below.",
    };
  });

  // Depth
  const layers = axis(data.layers, 18);
  const series = (rows, names, x) => rows.map((y, number) => ({
    type: "scatter", mode: x.length < 60 ? "lines+markers" : "lines", x, y, name: names[number],
    line: line(number), marker: { size: 5 },
    hovertemplate: "%{fullData.name}, %{x}: %{y:.4g}<extra></extra>",
  }));
  const layerAxis = { type: "category", title: { text: "layer" } };
  select("models-lines-statistic", data.ofModels.map((one) => one.label));
  draw("models-lines", () => {
    const one = data.ofModels[chosen("models-lines-statistic")];
    return {
      traces: series(one.series, models, layers),
      xaxis: layerAxis, yaxis: { title: { text: clean(one.label) }, rangemode: "tozero" },
      about: `Lines over ${layers.length} layers, one for each model: ${one.label}, `
        + `${span(one.series)}.`,
    };
  });
  draw("models-map", () => {
    const one = data.ofModels[chosen("models-lines-statistic")];
    return {
      traces: [heat(one.series, layers, models, false, one.label)],
      xaxis: { ...category, title: { text: "layer" } }, yaxis: reversed,
      about: `Heat map of layers by models: ${one.label}, ${span(one.series)}.`,
    };
  });
  select("pairs-lines-statistic", data.ofPairs.map((one) => one.label));
  draw("pairs-lines", () => {
    const one = data.ofPairs[chosen("pairs-lines-statistic")];
    const [mean, low, high] = one.series;
    const shape = { type: "scatter", mode: "lines", x: layers, line: { width: 0 }, hoverinfo: "skip" };
    const first = line(0);
    return {
      traces: [
        { ...shape, y: high, showlegend: false },
        {
          ...shape, y: low, fill: "tonexty", fillcolor: first.color + "2e", name: "lowest to highest",
        },
        { ...series([mean], ["mean"], layers)[0] },
      ],
      xaxis: layerAxis, yaxis: { title: { text: clean(one.label) } },
      about: `Lines over ${layers.length} layers: ${one.label}, mean of the pairs ${span([mean])}, `
        + `single pairs ${span([low, high])}.`,
    };
  });
  if (data.grid) {
    select("grid-statistic", data.grid.statistics.map((one) => one.label));
    draw("grid", () => {
      const one = data.grid.statistics[chosen("grid-statistic")];
      return {
        traces: [heat(one.values, axis(data.grid.types, 26), layers, one.signed, one.label)],
        xaxis: { ...category, tickangle: -40 },
        yaxis: { ...reversed, title: { text: "layer" } },
        about: `Heat map of layers by module types: ${one.label}, ${span(one.values)}.`,
      };
    });
  }
  if (data.alike) {
    draw("alike", () => ({
      traces: [heat(data.alike.values, layers, layers, true, "correlation", { zmin: -1, zmax: 1 })],
      xaxis: { ...category, title: { text: "layer" } },
      yaxis: { ...reversed, title: { text: "layer" } },
      about: "Heat map of layers by layers: correlation of their cosines over the pairs of models, "
        + `${span(data.alike.values)}.`,
    }));
  }

  // Magnitudes
  select("histogram-place", data.histograms.map((one) => one.place));
  draw("histogram", () => {
    const one = data.histograms[chosen("histogram-place")];
    const x = one.middles.map((middle) => 2 ** middle);
    const traces = one.shares.map((y, number) => ({
      type: "scatter", mode: "lines", x, y, name: models[number], line: { ...line(number), shape: "hvh" },
      hovertemplate: "%{fullData.name}, %{x:.3g}: %{y:.3g} %<extra></extra>",
    }));
    const zeros = one.zeros.map((zero, number) => `${data.models[number]} ${text(zero)} %`).join(", ");
    return {
      traces, xaxis: { type: "log", exponentformat: "power", title: { text: "|τ|" } },
      yaxis: { title: { text: "entries per octave, %" }, rangemode: "tozero" },
      about: `Histogram of magnitudes of the task vectors, ${one.place}. Unchanged: ${zeros}.`,
    };
  });
  if (data.densities.length) {
    const x = data.densities.map((density) => 100 * density);
    draw("trim", () => ({
      traces: data.trim.norm.map((y, number) => ({
        ...series([y], [models[number]], x)[0], line: line(number), mode: "lines+markers",
      })),
      xaxis: { title: { text: "density, % of the entries" }, rangemode: "tozero" },
      yaxis: { title: { text: "squared norm, %" }, range: [0, 103] },
      about: `Lines over densities, one for each model: share of the squared norm, ${span(data.trim.norm)}.`,
    }));
  }

  // Spectra
  if (data.spectra) {
    const tensors = axis(data.spectra.tensors, 34);
    const matrixAxis = {
      type: "category", tickangle: -50, tickfont: { size: 9 }, showticklabels: tensors.length <= 30,
      title: { text: tensors.length <= 30 ? "" : `${tensors.length} matrices, in the order of the table` },
    };
    select("spectra-models-statistic", data.spectra.ofModels.map((one) => one.label));
    draw("spectra-models", () => {
      const one = data.spectra.ofModels[chosen("spectra-models-statistic")];
      return {
        traces: series(one.series, models, tensors).map((t) => ({ ...t, mode: "markers" })),
        xaxis: matrixAxis, yaxis: { title: { text: clean(one.label) }, rangemode: "tozero" },
        legend: { orientation: "v" },
        about: `Points, one for each matrix and model: ${one.label}, ${span(one.series)}.`,
      };
    });
    select("spectra-values-tensor", data.spectra.tensors.slice(0, data.spectra.singular.length));
    draw("spectra-values", () => {
      const number = chosen("spectra-values-tensor");
      const rows = data.spectra.singular[number];
      const ranks = (rows[0] || []).map((_, k) => k + 1);
      return {
        traces: series(rows, models, ranks),
        xaxis: { title: { text: "number" } },
        yaxis: { title: { text: "singular value" }, rangemode: "tozero" },
        about: `Largest singular values of ${data.spectra.tensors[number]}: ${span(rows)}.`,
      };
    });
    select("spectra-pairs-statistic", data.spectra.between.map((one) => one.label));
    draw("spectra-pairs", () => {
      const one = data.spectra.between[chosen("spectra-pairs-statistic")];
      return {
        traces: series(one.series, [clean(one.label)], tensors).map((t) => ({ ...t, mode: "markers" })),
        xaxis: matrixAxis, yaxis: { title: { text: clean(one.label) }, rangemode: "tozero" },
        about: `Points, one for each matrix: ${one.label}, ${span(one.series)}.`,
      };
    });
  }

  // Expected loss
  draw("predicted", () => {
    const x = data.predicted.scales;
    const solid = series(data.predicted.lost, models, x).map((t, number) => ({
      ...t, mode: "lines", legendgroup: String(number),
    }));
    const dotted = series(data.predicted.least, models, x).map((t, number) => ({
      ...t, mode: "lines", line: { ...line(number), dash: "dot", width: 1 },
      legendgroup: String(number), showlegend: false, hoverinfo: "skip", hovertemplate: undefined,
    }));
    const highest = Math.min(150, Math.max(100, ...finite(data.predicted.lost)));
    return {
      traces: [...dotted, ...solid],
      xaxis: { title: { text: "λ" } },
      yaxis: { title: { text: "share of the gain that is lost, %" }, range: [0, highest] },
      about: `Lines over the coefficient λ, one for each model: expected loss, `
        + `${span(data.predicted.lost)} %.`,
    };
  });

  // Light and dark
  const button = element("theme");
  function theme(name) {
    root.dataset.theme = name;
    button.textContent = name === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${name === "dark" ? "light" : "dark"} colours`);
    return drawAll();
  }
  button.addEventListener("click", () => theme(dark() ? "light" : "dark"));
  const preferred = window.matchMedia("(prefers-color-scheme: dark)");
  preferred.addEventListener("change", (event) => theme(event.matches ? "dark" : "light"));
  theme(preferred.matches ? "dark" : "light").then(() => root.setAttribute("data-drawn", "true"));
})();
