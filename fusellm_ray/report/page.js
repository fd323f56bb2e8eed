// Shows the values under the pointer in each chart's legend; without it the legend keeps the last values.
for (const figure of document.querySelectorAll("[data-chart]")) {
  const data = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg");
  const cursor = figure.querySelector(".cursor");
  const output = figure.querySelector("output");
  const values = [...figure.querySelectorAll(".legend b")];
  const last = values.map((value) => value.textContent);
  const [left, right, width] = data.plot;
  const [low, high] = data.x;
  const show = (y) =>
    data.unit === "share" ? (100 * y).toFixed(data.digits) + " %" : y.toLocaleString("en", { maximumSignificantDigits: 5 });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    const share = Math.min(1, Math.max(0, (at - left) / (right - left)));
    const x = low + share * (high - low);
    let nearest = low;
    data.series.forEach((series, index) => {
      let best = 0;
      series.x.forEach((other, i) => {
        if (Math.abs(other - x) < Math.abs(series.x[best] - x)) best = i;
      });
      values[index].textContent = show(series.y[best]);
      if (index === 0) nearest = series.x[best];
    });
    const position = high > low ? left + ((nearest - low) / (high - low)) * (right - left) : (left + right) / 2;
    cursor.setAttribute("x1", position);
    cursor.setAttribute("x2", position);
    cursor.removeAttribute("hidden");
    output.textContent = `${data.xName} ${nearest.toLocaleString("en", { maximumFractionDigits: 1 })}`;
  });
  svg.addEventListener("pointerleave", () => {
    values.forEach((value, index) => (value.textContent = last[index]));
    cursor.setAttribute("hidden", "");
    output.textContent = "";
  });
}
