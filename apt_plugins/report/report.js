"use strict";
// Values under the pointer, or by the arrow keys. Without this the page shows all but those.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const tip = document.getElementById("tip");
  const make = (name) => document.createElementNS("http://www.w3.org/2000/svg", name);
  const format = (value) => {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(3);
    return value.toLocaleString("en", { maximumSignificantDigits: 5 });
  };
  const share = ([low, high, log], value) =>
    log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  const place = (axis, value) => axis[3] + share(axis, value) * (axis[4] - axis[3]);
  const stepAt = ([low, high, log, left, right], pixel) => {
    const part = (pixel - left) / (right - left);
    return log ? low * (high / low) ** part : low + part * (high - low);
  };
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return step - steps[low] < steps[high] - step ? low : high;
  };

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = { ...charts[svg.dataset.chart] };
    if (typeof chart.series === "number") chart.series = charts[chart.series].series;
    if (!chart.series.length) continue;
    const cursor = make("path"), dots = make("g");
    cursor.setAttribute("class", "cursor");
    dots.setAttribute("class", "cursor-dots");
    svg.append(cursor, dots);
    let step = null;

    const show = (wanted, clientY) => {
      const main = chart.series.reduce((a, b) => (b.x.length > a.x.length ? b : a));
      step = main.x[nearest(main.x, wanted)];
      const pixel = place(chart.x, step), top = chart.y[4], bottom = chart.y[3];
      cursor.setAttribute("d", `M${pixel} ${top}V${bottom}`);
      dots.replaceChildren();
      const head = document.createElement("div");
      const unit = chart.unit ?? "step";
      head.textContent = `${unit} ${step.toLocaleString("en")}`;
      tip.replaceChildren(head);
      for (const series of chart.series) {
        const at = nearest(series.x, step), value = series.y[at];
        if (!chart.stacked) {
          const dot = make("path");
          dot.setAttribute("class", `c${series.color}`);
          dot.setAttribute("d", `M${place(chart.x, series.x[at])} ${place(chart.y, value)}h0`);
          dots.append(dot);
        }
        const row = document.createElement("div"), key = document.createElement("i");
        const name = document.createElement("span"), number = document.createElement("b");
        key.className = `c${series.color}`;
        name.textContent = series.x[at] === step ? series.name
          : `${series.name} (${unit} ${series.x[at].toLocaleString("en")})`;
        number.textContent = format(value);
        row.append(key, name, number);
        tip.append(row);
      }
      tip.hidden = false;
      const box = svg.getBoundingClientRect();
      const x = box.left + (pixel * box.width) / svg.viewBox.baseVal.width;
      const y = clientY ?? box.top + 20;
      const over = x + 16 + tip.offsetWidth > window.innerWidth;
      tip.style.left = `${Math.max(4, over ? x - 16 - tip.offsetWidth : x + 16)}px`;
      tip.style.top = `${Math.min(y + 12, window.innerHeight - tip.offsetHeight - 8)}px`;
    };
    const hide = () => {
      tip.hidden = true;
      cursor.removeAttribute("d");
      dots.replaceChildren();
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const pixel = ((event.clientX - box.left) * svg.viewBox.baseVal.width) / box.width;
      show(stepAt(chart.x, pixel), event.clientY);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      const pixel = step === null || tip.hidden ? chart.x[3] : place(chart.x, step) + 6 * by;
      show(stepAt(chart.x, Math.min(Math.max(pixel, chart.x[3]), chart.x[4])));
    });
  }
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
