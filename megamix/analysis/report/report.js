"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const make = (tag, text, look) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (look) element.className = look;
    return element;
  };
  const tokens = (value) => {
    for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]])
      if (value >= size) return (value / size).toPrecision(4) + unit;
    return String(value);
  };

  // The last place with xs[place] <= x; -1 before the first.
  const before = (xs, x) => {
    let low = 0, high = xs.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= x) low = middle + 1; else high = middle;
    }
    return low - 1;
  };
  const nearest = (xs, x) => {
    const left = Math.max(before(xs, x), 0), right = Math.min(left + 1, xs.length - 1);
    return xs[right] - x < x - xs[left] ? right : left;
  };
  const valuesAt = (chart, x) => chart.rows.map(([name, look], row) => {
    const xs = chart.x[chart.x.length === 1 ? 0 : row];
    const place = chart.mode === "step" ? before(xs, x) : nearest(xs, x);
    // A run that has ended has no value any more.
    const over = chart.mode === "step" && x > xs[xs.length - 1];
    return {name, look, at: xs[place], value: place < 0 || over ? null : chart.y[row][place]};
  }).filter((row) => row.value !== null);

  const show = (plot, x, left, top) => {
    const chart = charts[plot.dataset.chart];
    const [low, high] = plot.dataset.x.split(" ").map(Number);
    const rows = valuesAt(chart, x).sort((a, b) => b.value - a.value);
    if (!rows.length) return hide(plot);
    const at = chart.mode === "step" ? x : rows[0].at;
    let cursor = plot.querySelector(".cursor");
    if (!cursor) plot.append(cursor = make("div", undefined, "cursor"));
    cursor.style.left = 100 * (at - low) / (high - low) + "%";
    const list = make("ul", undefined, rows.length > 12 ? "long" : "");
    for (const row of rows) {
      const item = make("li");
      item.append(make("i", undefined, "swatch " + row.look), make("span", row.name));
      item.append(document.createTextNode(row.value.toFixed(4)));
      list.append(item);
    }
    tip.replaceChildren(make("b", tokens(Math.round(at)) + " tokens"), list);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const room = document.documentElement.clientWidth;
    tip.style.left = Math.max(4, left + 16 + box.width > room ? left - box.width - 16 : left + 16) + "px";
    tip.style.top = Math.max(4, Math.min(top - box.height / 2, window.innerHeight - box.height - 4)) + "px";
  };
  const hide = (plot) => {
    tip.hidden = true;
    plot.querySelector(".cursor")?.remove();
  };

  for (const plot of document.querySelectorAll(".plot[data-chart]")) {
    const [low, high] = plot.dataset.x.split(" ").map(Number);
    const follow = (event) => {
      const box = plot.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      show(plot, low + share * (high - low), event.clientX, event.clientY);
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", () => hide(plot));
    plot.addEventListener("blur", () => hide(plot));
    let place = null;
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hide(plot);
      const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (!move) return;
      event.preventDefault();
      const xs = charts[plot.dataset.chart].x.reduce((a, b) => (b.length > a.length ? b : a));
      place = place === null ? (move > 0 ? 0 : xs.length - 1) : Math.min(xs.length - 1, Math.max(0, place + move));
      const box = plot.getBoundingClientRect();
      show(plot, xs[place], box.left + box.width * (xs[place] - low) / (high - low), box.top + box.height / 2);
    });
  }

  // A domain that is pointed at, or picked, lights up in all charts.
  let picked = null;
  const light = (look) => {
    for (const element of document.querySelectorAll("[data-d]")) {
      element.classList.toggle("faded", look !== null && element.dataset.d !== look);
      element.classList.toggle("lit", look !== null && element.dataset.d === look);
    }
  };
  for (const button of document.querySelectorAll("[data-pick]")) {
    const look = button.dataset.pick;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      picked = picked === look ? null : look;
      for (const other of document.querySelectorAll("[data-pick]"))
        other.setAttribute("aria-pressed", String(other.dataset.pick === picked));
      light(picked);
    });
    button.addEventListener("mouseenter", () => light(look));
    button.addEventListener("mouseleave", () => light(picked));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        if (!cell.classList.contains("number")) return cell.textContent;
        return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
      };
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        // What is not known comes last either way.
        if (a === null || b === null) return (a === null) - (b === null);
        const order = typeof a === "number" ? a - b : a.localeCompare(b);
        return down ? -order : order;
      });
      body.append(...rows.map(([, row]) => row));
    }));
  }
})();
