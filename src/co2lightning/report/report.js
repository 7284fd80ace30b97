// The figures. Each takes its host element and its site and returns a function that draws it at
// a width in pixels; controls are made once, what is below them at every drawing.

const data = JSON.parse(document.getElementById("data").textContent);
const MOST_COMPARED = 4;  // in the explorer: any controller, a run, the best reference, the optimum
const explorers = new Map();

const policy = (site, key) => site.policies.find((one) => one.key === key);
const closely = (site) => [...site.runs, ...site.rules];  // what is looked at closely
const body = (host, ...before) => {
  const inner = html("div");
  host.append(...before, inner);
  return inner;
};

function intervals(host, site) {
  const rows = [...site.runs, ...site.policies];
  const panel = (inner, width, label, shown, mean, half, bars) => {
    const spread = shown.flatMap((row) => [row[mean] - (row[half] || 0), row[mean] + (row[half] || 0)]);
    const left = gutter(shown.map((row) => row.title), width), height = shown.length * 24 + 52;
    const range = bars ? extent(spread, 0) : extent([0, ...spread]);
    const area = plot(inner, {
      width, height, left, name: label, x: { range, label }, y: { range: [0, 1] },
    });
    if (!bars) {
      const zero = area.x(0);
      shape(area.svg, "line", { class: "axis", x1: zero, x2: zero, y1: area.top, y2: area.bottom });
    }
    shown.forEach((row, i) => {
      const y = area.top + 14 + i * 24, x = area.x(row[mean]);
      rowName(area.svg, left - 8, y + 4, row.title);
      if (bars) {
        shape(area.svg, "line", {
          class: `bar ${row.look}`, x1: area.x(0), x2: x, y1: y, y2: y,
        });
      }
      if (row[half] !== null) {
        shape(area.svg, "line", {
          class: "whisker", x1: area.x(row[mean] - row[half]), x2: area.x(row[mean] + row[half]), y1: y, y2: y,
        });
      }
      if (!bars) mark(area.svg, row.mark || "dot", x, y, 3.5, `mark ${row.look}`);
    });
  };
  return (width) => {
    const wide = width > 720, each = wide ? (width - 24) / 2 : width;
    const inner = html("div", { class: wide ? "two" : "" });
    const panels = [html("div", { class: "panel" }), html("div", { class: "panel" })];
    inner.append(...panels);
    host.replaceChildren(inner);
    const { name, a_day, best_title } = site.settled;
    panel(panels[0], each, `${name}, ${a_day}`, rows, "mean", "mean_interval", true);
    const others = [...site.runs, ...site.policies.filter((one) => site.paired.includes(one.key))];
    panel(panels[1], each, `${name} against ${best_title}, ${a_day} (left is better)`, others,
      "vs_best", "vs_best_interval", false);
  };
}

function learning(host, site) {
  const { name, a_day } = site.settled;
  let unit = "share", width = 0;
  const [, label] = choice(`${name} as`, [["share", "share of uncontrolled"], ["amount", a_day]], unit,
    (value) => { unit = value; draw(width); });
  const inner = body(host, html("div", { class: "controls" }, label));
  const draw = (now) => {
    width = now;
    const share = unit === "share", column = share ? 2 : 1, mean = share ? "share" : "mean";
    const scale = share ? 100 : 1;
    const curves = site.runs.map((run) =>
      run.curve.filter((row) => row[column] !== null).map((row) => [row[0], row[column] * scale]));
    const level = (one) => one[mean] * scale;
    const last = Math.max(2, ...site.runs.map((run) => run.episode), ...curves.flat().map((p) => p[0]));
    const every = ticks(1, last, Math.min(last - 1, width / 80)).filter(([at]) => Number.isInteger(at));
    if (!every.some(([at]) => at === 1) && every[0][0] > last / 12) every.unshift([1, "1"]);
    const area = plot(html("div"), {
      width, height: Math.min(420, Math.max(280, width * 0.5)),
      name: `Learning curves: ${name} over episodes`,
      x: { range: [1, last], label: "episode", ticks: every },
      y: {
        range: extent([...curves.flat().map((p) => p[1]), ...[...site.policies, ...site.runs].map(level)], 0),
        label: share ? `${name}, % of the same days uncontrolled` : `${name}, ${a_day}`,
      },
    });
    for (const one of site.policies) line(area, [[1, level(one)], [last, level(one)]], `thin ${one.look}`);
    curves.forEach((curve, i) => {
      const run = site.runs[i];
      const points = curve.flatMap((p, at) => (at && p[0] > curve[at - 1][0] + 1 ? [null, p] : [p]));
      line(area, points, run.look);
      if (curve.length < 40) {
        for (const p of curve) mark(area.svg, run.mark, area.x(p[0]), area.y(p[1]), 3, `mark ${run.look}`);
      }
    });
    for (const run of site.runs) {
      mark(area.svg, run.mark, area.x(run.episode), area.y(level(run)), 6.5, `hollow ${run.look}`);
    }
    inner.replaceChildren(
      legend([
        ...site.runs.map((run) => ({ text: `${run.title}, training days`, look: run.look, kind: "line" })),
        ...site.runs.map((run) => ({ text: `${run.title}, held out`, look: `hollow ${run.look}`, kind: run.mark })),
        ...site.policies.map((one) => ({ text: `${one.title}, held out`, look: `thin ${one.look}`, kind: "line" })),
      ]),
      area.svg);
  };
  return draw;
}

function stretches(host, site) {
  const { name, a_day, best_title, digits } = site.settled, unit = site.settled.unit && ` ${site.settled.unit}`;
  const rule = policy(site, site.settled.best), best = policy(site, "optimum"), count = site.stretches.length;
  let against = "", width = 0;
  const [, label] = choice("Show", [["", name], ["rule", `difference to ${best_title}`]], against,
    (value) => { against = value; draw(width); });
  const inner = body(host, html("div", { class: "controls" }, label));
  const draw = (now) => {
    width = now;
    const level = (one, at) => one.a_day[at] - (against ? rule.a_day[at] : 0);
    const all = [rule, best, ...closely(site)].flatMap((one) => one.a_day.map((_, at) => level(one, at)));
    const panels = closely(site).map((run) => {
      const panel = html("div", { class: "panel" });
      if (closely(site).length > 1) panel.append(html("h4", {}, run.title));
      panel.append(legend([
        { text: run.title, look: `mark ${run.look}`, kind: run.mark },
        { text: rule.title, look: `hollow ${rule.look}`, kind: "dot" },
        { text: best.title, look: "mark optimum", kind: "dash" },
      ]));
      const every = Math.max(1, Math.ceil(count / Math.max(1, (width - 60) / 95)));
      const area = plot(panel, {
        width, height: 240, name: `${name} of each held-out stretch, ${run.title}`,
        x: {
          range: [-0.5, count - 0.5], label: "first day of the held-out stretch",
          ticks: site.stretches.map((one, at) => [at, one.from]).filter((_, at) => at % every === 0),
        },
        y: { range: extent(all, against ? null : 0), label: against ? `${name} against ${best_title}, ${a_day} (down is better)` : `${name}, ${a_day}` },
      });
      const column = (area.right - area.left) / count, size = Math.max(2, Math.min(5, column * 0.4));
      site.stretches.forEach((one, at) => {
        const x = area.x(at), own = area.y(level(run, at)), ruled = area.y(level(rule, at));
        shape(area.svg, "line", { class: `join ${run.look}`, x1: x, x2: x, y1: own, y2: ruled });
        mark(area.svg, "dot", x, ruled, size, `hollow ${rule.look}`);
        mark(area.svg, run.mark, x, own, size, `mark ${run.look}`);
        mark(area.svg, "dash", x, area.y(level(best, at)), 1.6 * size, "mark optimum");  // on top of what is near
        const hit = shape(area.svg, "rect", {
          class: "hit", x: x - column / 2, y: area.top, width: column, height: area.bottom - area.top,
        });
        shape(hit, "title", {}, `${named(one)}: ${run.title} ${run.a_day[at].toFixed(digits)} ${a_day}, ` +
          `${rule.title} ${rule.a_day[at].toFixed(digits)}${unit}, ${best.title} ${best.a_day[at].toFixed(digits)}${unit}; ` +
          `unmet ${run.unmet_kwh[at].toFixed(3)} kWh a day`);
        hit.addEventListener("click", () => explorers.get(site)(at, run.key));
      });
      return panel;
    });
    inner.replaceChildren(...panels);
  };
  return draw;
}

const named = (stretch) => (stretch.from === stretch.to ? stretch.from : `${stretch.from} to ${stretch.to}`);

function explorer(host, site) {
  const shown = [...site.runs, ...site.policies], parts = site.parts, step = site.step_h;
  let [at, day] = site.typical_day, width = 0;
  const first = site.runs.length ? site.runs : site.rules;
  let run = first.reduce((best, one) => (one.mean < best.mean ? one : best));  // stays in view beside a reference
  let chosen = shown.findIndex((one) => one.key === run.key);
  const [stretchSelect, stretchLabel] = choice("Stretch", site.stretches.map((one, i) => [i, named(one)]), at,
    (value) => open(Number(value), 0));
  const [daySelect, dayLabel] = choice("Day", [], "", (value) => open(at, Number(value)));
  const [ownSelect, ownLabel] = choice("Controller", shown.map((one, i) => [i, one.title]), chosen,
    (value) => { chosen = Number(value); draw(width); });
  const controls = html("div", { class: "controls" }, stretchLabel);
  if (site.stretches.some((one) => one.days.length > 1)) controls.append(dayLabel);
  controls.append(ownLabel);
  const inner = body(host, controls);
  const fill = () => {
    daySelect.replaceChildren(...site.stretches[at].days.map(([date], i) => html("option", { value: i }, date)));
    stretchSelect.value = at;
    daySelect.value = day;
  };
  const open = (stretch, chosenDay) => {
    at = stretch;
    day = chosenDay;
    fill();
    draw(width);
  };
  explorers.set(site, (stretch, key) => {
    chosen = shown.findIndex((one) => one.key === key);
    ownSelect.value = chosen;
    open(stretch, 0);
    host.scrollIntoView({ block: "nearest" });
  });
  const hours = (values) => stairs(values, step);
  const draw = (now) => {
    width = now;
    const stretch = site.stretches[at], [date, begin, end] = stretch.days[day];
    const own = shown[chosen];
    if (chosen < site.runs.length) run = own;
    const compared = [...new Set([own, shown.find((one) => one.key === run.key), policy(site, site.settled.best), policy(site, "optimum")])];
    const of = (one, what) => one.schedule[at][what].slice(begin, end);
    const series = (what) => stretch[what].slice(begin, end);
    const money = site.settled.key === "cost", unit = money ? site.settled.unit : "kg";
    const pv = series("pv_kw"), carbon = series(money ? "price" : "carbon"), count = end - begin;
    const minutes = stretch.clock.slice(begin, end + 1);
    const every = (width > 560 ? 3 : 6) * 60;
    const clock = (minute) => `${Math.floor(minute / 60)}:${String(minute % 60).padStart(2, "0")}`;
    const marks = minutes.flatMap((minute, i) => (minute % every === 0 ? [[i * step, clock(minute)]] : []));
    const axis = { range: [0, count * step], label: "local time", ticks: marks };
    const areas = [];
    const panel = (title, entries, height, y, draws) => {
      const box = html("div", { class: "panel" });
      if (entries.length) box.append(legend(entries, Math.max(entries.length, MOST_COMPARED)));
      const area = plot(box, { width, height, x: axis, y, name: `${title}, ${own.title}, ${date}` });
      draws(area);
      areas.push(area);
      return box;
    };
    const powers = [
      ...(parts.ev ? [["EV charging", "ev", of(own, "ev_kw")]] : []),
      ...(parts.battery ? [["battery (charging +)", "battery", of(own, "battery_kw")]] : []),
      ["grid import", "grid", of(own, "grid_import_kw")],
      ...(parts.load ? [["building load", "load", series("load_kw")]] : []),
    ];
    const range = extent([0, ...pv, ...powers.flatMap(([, , values]) => values)]);
    const power = panel("Power",
      [...(parts.pv ? [{ text: "PV available", look: "area pv", kind: "area" }] : []),
        ...powers.map(([text, name]) => ({ text, look: name, kind: "line" }))],
      320, { range, label: "power, kW" }, (area) => {
        if (parts.pv) {
          const path = [[0, 0], ...hours(pv), [count * step, 0]];
          shape(area.svg, "path", {
            class: "area pv", d: "M" + path.map(([x, y]) => `${area.x(x).toFixed(1)} ${area.y(y).toFixed(1)}`).join("L"),
          });
        }
        const zero = area.y(0);
        shape(area.svg, "line", { class: "axis", x1: area.left, x2: area.right, y1: zero, y2: zero });
        for (const [, name, values] of [...powers].reverse()) line(area, hours(values), name);
      });
    const names = compared.map((one) => ({ text: one.title, look: one.look, kind: "line" }));
    const soc = parts.battery && panel("SoC", names, 190, { range: [0, 100], label: "battery SoC, %" }, (area) => {
      for (const one of [...compared].reverse()) {
        const levels = [begin ? one.schedule[at].soc[begin - 1] : site.soc_start, ...of(one, "soc")];
        line(area, levels.map((value, i) => [i * step, 100 * value]), one.look);
      }
    });
    const of_kwh = unit ? `, ${unit}/kWh` : " of a kWh", of_unit = unit && ` ${unit}`, each_kwh = unit && ` ${unit}/kWh`;
    const intensity = panel(money ? "Price" : "Carbon intensity", [], 150,
      { range: extent(carbon, 0), label: `${money ? "price" : "carbon intensity"} of the grid${of_kwh}` },
      (area) => line(area, hours(carbon), "carbon"));
    const sums = compared.map((one) => {
      let sum = 0;
      return [0, ...of(one, money ? "cost" : "co2_kg").map((amount) => (sum += amount))];
    });
    const since = `${money ? "cost less what export earns" : "CO2 of the import"} since the day began`;
    const total = panel(money ? "Cumulative cost" : "Cumulative CO2", names, 220,
      { range: extent(sums.flat(), 0), label: unit ? `${since}, ${unit}` : since }, (area) => {
        sums.forEach((values, i) => line(area, values.map((value, to) => [to * step, value]), compared[i].look));
      });
    const readout = html("output", { class: "readout" });
    const say = (cells) => {
      const empty = Array.from({ length: MOST_COMPARED - compared.length }, () => ["", ""]);
      readout.replaceChildren(...[...cells, ...empty].map(([name, value]) =>
        html("span", name ? { title: name } : {}, `${name} `, html("b", {}, value))));
    };
    const short = (text) => text.replace(/ \(.*/, "");
    const fixed = (value) => signed(value, Math.abs(value) < 10 ? 2 : Math.abs(value) < 100 ? 1 : 0);
    const energy = (values) => values.reduce((sum, kw) => sum + kw * step, 0);
    const tellDay = () => say([
      ["whole day", date],
      ...(parts.pv ? [["PV available", `${fixed(energy(pv))} kWh`]] : []),
      ...powers.map(([text, , values]) => [short(text), `${fixed(energy(values))} kWh`]),
      [money ? "mean price" : "mean intensity",
        `${(carbon.reduce((sum, value) => sum + value, 0) / count).toFixed(3)}${each_kwh}`],
      ...(parts.battery ? [["SoC at its end", `${(100 * own.schedule[at].soc[end - 1]).toFixed(0)} %`]] : []),
      ...compared.map((one, i) => [one.title, `${sums[i].at(-1).toFixed(site.settled.digits)}${of_unit} (meter)`]),
    ]);
    const tell = (i) => say([
      ["time", `${clock(minutes[i])}\u2013${clock(minutes[i + 1])}`],
      ...(parts.pv ? [["PV available", `${fixed(pv[i])} kW`]] : []),
      ...powers.map(([text, , values]) => [short(text), `${fixed(values[i])} kW`]),
      [money ? "price" : "intensity", `${carbon[i].toFixed(3)}${each_kwh}`],
      ...(parts.battery ? [["SoC", `${(100 * own.schedule[at].soc[begin + i]).toFixed(0)} %`]] : []),
      ...compared.map((one, k) => [one.title, `${sums[k][i + 1].toFixed(site.settled.digits)}${of_unit} (meter)`]),
    ]);
    tellDay();
    for (const area of areas) {
      area.cursor = shape(area.svg, "line", { class: "cursor", y1: area.top, y2: area.bottom, visibility: "hidden" });
      area.svg.addEventListener("pointermove", (event) => {
        const box = area.svg.getBoundingClientRect();
        const share = ((event.clientX - box.left) * (width / box.width) - area.left) / (area.right - area.left);
        const i = Math.min(count - 1, Math.max(0, Math.floor(share * count)));
        tell(i);
        for (const { cursor, x } of areas) {
          for (const side of ["x1", "x2"]) cursor.setAttribute(side, x((i + 0.5) * step));
          cursor.setAttribute("visibility", "visible");
        }
      });
      area.svg.addEventListener("pointerleave", () => {
        tellDay();
        for (const { cursor } of areas) cursor.setAttribute("visibility", "hidden");
      });
    }
    inner.replaceChildren(...[readout, power, soc, intensity, total].filter(Boolean));
  };
  fill();
  return draw;
}

function heat(host, site) {
  const options = [["battery_kw", "battery power (charging +)"], ["ev_kw", "EV charging power"]]
    .filter(([key]) => key in site.heat_limit_kw);
  let [[what]] = options, width = 0;
  const [, label] = choice("Difference in", options, what, (value) => { what = value; draw(width); });
  const inner = body(host, html("div", { class: "controls" }, label));
  const classes = site.soc_classes, [first, end] = site.soc_band;
  const draw = (now) => {
    width = now;
    const limit = site.heat_limit_kw[what];
    const tint = (value) => ({
      class: value < 0 ? "minus" : "plus", "fill-opacity": Math.min(1, Math.abs(value) / limit).toFixed(3),
    });
    const wide = width > 720 && closely(site).length > 1, each = wide ? (width - 24) / 2 : width;
    const panels = html("div", { class: wide ? "two" : "" });
    for (const run of closely(site)) {
      const panel = html("div", { class: "panel" });
      if (closely(site).length > 1) panel.append(html("h4", {}, run.title));
      const every = each > 430 ? 3 : 6;
      const area = plot(panel, {
        width: each, height: site.parts.battery ? 280 : 90, name: `${options.find(([key]) => key === what)[1]}: ${run.title} minus RBC B`,
        x: { range: [0, 24], label: "local time", ticks: Array.from({ length: 24 / every + 1 }, (_, i) => [i * every, `${i * every}:00`]) },
        y: { range: [(100 * first) / classes, (100 * end) / classes], label: site.parts.battery ? "battery SoC, %" : "" },
      });
      shape(area.svg, "rect", { class: "never", x: area.left, y: area.top, width: area.right - area.left, height: area.bottom - area.top });
      for (let hour = 0; hour < site.hours; hour++) {
        for (let level = first; level < end; level++) {
          const value = run.heat[what][hour][level];
          if (value === null) continue;
          const x = area.x(hour), y = area.y((100 * (level + 1)) / classes);
          const box = {
            x: x.toFixed(1), y: y.toFixed(1), width: (area.x(hour + 1) - x).toFixed(1), height: (area.y((100 * level) / classes) - y).toFixed(1),
            "shape-rendering": "crispEdges",
          };
          shape(area.svg, "rect", { class: "same", ...box });
          const cell = shape(area.svg, "rect", { ...tint(value), ...box });
          shape(cell, "title", {}, `${hour}:00\u2013${hour + 1}:00${site.parts.battery ? `, SoC ${(100 * level) / classes}\u2013${(100 * (level + 1)) / classes} %` : ""}: ` +
            `${signed(value, 1, "+")} kW, mean of ${run.heat.steps[hour][level]} steps`);
        }
      }
      panels.append(panel);
    }
    const scale = html("ul", { class: "legend" });
    const swatch = (text, ...boxes) => {
      const item = html("li");
      const svg = shape(item, "svg", { viewBox: "0 0 30 12", "aria-hidden": "true" });
      for (const box of boxes) shape(svg, "rect", { x: 1, y: 0.5, width: 28, height: 11, ...box });
      item.append(text);
      scale.append(item);
    };
    for (const part of [-1, -0.5, 0, 0.5, 1]) {
      const unit = part === 1 ? " kW and more: above RBC B" : part === -1 ? " kW and less: below" : " kW";
      swatch(signed(part * limit, limit < 10 ? 1 : 0, "+") + unit, { class: "same" }, tint(part * limit));
    }
    swatch("never there", { class: "never" });
    inner.replaceChildren(scale, panels);
  };
  return draw;
}

function sessions(host) {
  const runs = data.sites.flatMap((site) => site.runs);
  const rows = runs.flatMap((run, row) => run.sessions.map((session) => {
    const begun = Date.parse(session.session_timestamp);
    return { ...session, row, begun, end: begun + 1000 * session.duration_seconds };
  })).filter(({ begun, end }) => Number.isFinite(begun) && Number.isFinite(end));
  if (!rows.length) return () => {};
  const found = /([+-])(\d\d):(\d\d)$/.exec(rows[0].session_timestamp);
  const offset = found ? Number(found[1] + 1) * (found[2] * 60 + Number(found[3])) * 60000 : 0;
  const from = Math.min(...rows.map((row) => row.begun)), to = Math.max(from + 1000, ...rows.map((row) => row.end));
  const STEPS_S = [1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 10800, 21600, 43200, 86400];
  return (width) => {
    const left = gutter(runs.map((run) => run.key), width), most = Math.max(1, (width - left) / 75), span = to - from;
    const step = 1000 * (STEPS_S.find((s) => span / 1000 / s <= most) || 86400 * Math.ceil(span / 864e5 / most));
    const text = (ms) => {
      const iso = new Date(ms + offset).toISOString();
      return step >= 864e5 ? iso.slice(0, 10) : iso.slice(11, step >= 6e4 ? 16 : 19);
    };
    const marks = [];
    for (let at = Math.ceil((from + offset) / step) * step - offset; at <= to; at += step) marks.push([at, text(at)]);
    const day = new Date(from + offset).toISOString().slice(0, 10);
    const area = plot(html("div"), {
      width, height: runs.length * 24 + 52, left, name: "Sessions over time",
      x: { range: [from, to + span * 0.02], ticks: marks, label: `time, UTC${found ? found[0] : ""}; first session on ${day}` },
      y: { range: [0, 1] },
    });
    runs.forEach((run, row) => {
      rowName(area.svg, left - 8, area.top + row * 24 + 18, run.key);
    });
    for (const row of rows) {
      const x = area.x(row.begun);
      const bar = shape(area.svg, "rect", {
        class: `session ${row.status}`, x: x.toFixed(1), y: area.top + row.row * 24 + 7, height: 14, width: Math.max(4, area.x(row.end) - x).toFixed(1),
      });
      shape(bar, "title", {}, `${runs[row.row].key}, ${row.session_timestamp}: ${row.duration_seconds.toFixed(1)} s on ${row.device}, ${row.status}`);
    }
    const statuses = [...new Set(rows.map((row) => row.status))];
    host.replaceChildren(legend(statuses.map((status) => ({ text: status, look: `session ${status}`, kind: "area" }))), area.svg);
  };
}

const CHARTS = { intervals, learning, stretches, explorer, heat, sessions };
for (const host of document.querySelectorAll(".chart")) {
  const draw = CHARTS[host.dataset.chart](host, data.sites[host.dataset.site]);
  let width = 0;
  const fit = () => {
    if (host.clientWidth && host.clientWidth !== width) draw((width = host.clientWidth));
  };
  fit();
  // Paper is narrow: drawn for it, letters keep their size.
  addEventListener("beforeprint", () => draw(920));
  addEventListener("afterprint", () => draw(width));
  // In a frame of its own: a drawing may bring the scroll bar, which changes the width again.
  new ResizeObserver(() => requestAnimationFrame(fit)).observe(host);
}
