// The figures. Each takes its host element and its site and returns a function that draws it at
// a width in pixels; controls are made once, what is below them at every drawing.

const data = JSON.parse(document.getElementById("data").textContent);
const STEP_H = 0.25;
const MOST_COMPARED = 4;  // in the explorer: any controller, a run, RBC B, the optimum
const explorers = new Map();

const policy = (site, key) => site.policies.find((one) => one.key === key);
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
    panel(panels[0], each, "CO2, kg a day", rows, "mean_kg", "mean_interval_kg", true);
    const others = rows.filter((row) => row.look !== "rbc_b" && row.look !== "uncontrolled");
    panel(panels[1], each, "CO2 against RBC B, kg a day (left is better)", others,
      "vs_rbc_b_kg", "vs_rbc_b_interval_kg", false);
  };
}

function learning(host, site) {
  let unit = "share", width = 0;
  const [, label] = choice("CO2 as", [["share", "share of uncontrolled"], ["kg", "kg a day"]], unit,
    (value) => { unit = value; draw(width); });
  const inner = body(host, html("div", { class: "controls" }, label));
  const draw = (now) => {
    width = now;
    const share = unit === "share", column = share ? 2 : 1, mean = share ? "share" : "mean_kg";
    const scale = share ? 100 : 1;
    const curves = site.runs.map((run) =>
      run.curve.filter((row) => row[column] !== null).map((row) => [row[0], row[column] * scale]));
    const level = (one) => one[mean] * scale;
    const last = Math.max(2, ...site.runs.map((run) => run.episode), ...curves.flat().map((p) => p[0]));
    const every = ticks(1, last, Math.min(last - 1, width / 80)).filter(([at]) => Number.isInteger(at));
    if (!every.some(([at]) => at === 1) && every[0][0] > last / 12) every.unshift([1, "1"]);
    const area = plot(html("div"), {
      width, height: Math.min(420, Math.max(280, width * 0.5)),
      name: "Learning curves: CO2 over episodes",
      x: { range: [1, last], label: "episode", ticks: every },
      y: {
        range: extent([...curves.flat().map((p) => p[1]), ...[...site.policies, ...site.runs].map(level)], 0),
        label: share ? "CO2, % of the same days uncontrolled" : "CO2, kg a day",
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
        ...site.runs.map((run) => ({ text: `${run.title}, held-out days`, look: `hollow ${run.look}`, kind: run.mark })),
        ...site.policies.map((one) => ({ text: `${one.title}, held-out days`, look: `thin ${one.look}`, kind: "line" })),
      ]),
      area.svg);
  };
  return draw;
}

function days(host, site) {
  const rule = policy(site, "rbc_b"), best = policy(site, "optimum"), count = site.days.length;
  let against = "", width = 0;
  const [, label] = choice("Show", [["", "CO2"], ["rule", "difference to RBC B"]], against,
    (value) => { against = value; draw(width); });
  const inner = body(host, html("div", { class: "controls" }, label));
  const draw = (now) => {
    width = now;
    const level = (one, at) => one.co2_kg[at] - (against ? rule.co2_kg[at] : 0);
    const all = [rule, best, ...site.runs].flatMap((one) => one.co2_kg.map((_, at) => level(one, at)));
    const panels = site.runs.map((run) => {
      const panel = html("div", { class: "panel" });
      if (site.runs.length > 1) panel.append(html("h4", {}, run.title));
      panel.append(legend([
        { text: run.title, look: `mark ${run.look}`, kind: run.mark },
        { text: rule.title, look: "hollow rbc_b", kind: "dot" },
        { text: best.title, look: "mark optimum", kind: "dash" },
      ]));
      const every = Math.max(1, Math.ceil(count / Math.max(1, (width - 60) / 95)));
      const area = plot(panel, {
        width, height: 240, name: `CO2 of each held-out day, ${run.title}`,
        x: {
          range: [-0.5, count - 0.5], label: "held-out day",
          ticks: site.days.map((day, at) => [at, day]).filter((_, at) => at % every === 0),
        },
        y: { range: extent(all, against ? null : 0), label: against ? "CO2 against RBC B, kg (down is better)" : "CO2, kg" },
      });
      const column = (area.right - area.left) / count, size = Math.max(2, Math.min(5, column * 0.4));
      site.days.forEach((day, at) => {
        const x = area.x(at), own = area.y(level(run, at)), ruled = area.y(level(rule, at));
        shape(area.svg, "line", { class: `join ${run.look}`, x1: x, x2: x, y1: own, y2: ruled });
        mark(area.svg, "dash", x, area.y(level(best, at)), size, "mark optimum");
        mark(area.svg, "dot", x, ruled, size, "hollow rbc_b");
        mark(area.svg, run.mark, x, own, size, `mark ${run.look}`);
        const hit = shape(area.svg, "rect", {
          class: "hit", x: x - column / 2, y: area.top, width: column, height: area.bottom - area.top,
        });
        shape(hit, "title", {}, `${day}: ${run.title} ${run.co2_kg[at].toFixed(1)} kg, ` +
          `${rule.title} ${rule.co2_kg[at].toFixed(1)} kg, ${best.title} ${best.co2_kg[at].toFixed(1)} kg`);
        hit.addEventListener("click", () => explorers.get(site)(at, run.key));
      });
      return panel;
    });
    inner.replaceChildren(...panels);
  };
  return draw;
}

function explorer(host, site) {
  const shown = [...site.runs, ...site.policies];
  let day = site.typical_day, width = 0;
  let chosen = site.runs.reduce((best, run, i) => (run.mean_kg < site.runs[best].mean_kg ? i : best), 0);
  let run = site.runs[chosen];  // stays in view beside a reference
  const [daySelect, dayLabel] = choice("Day", site.days.map((text, at) => [at, text]), day,
    (value) => { day = Number(value); draw(width); });
  const [ownSelect, ownLabel] = choice("Controller", shown.map((one, at) => [at, one.title]), chosen,
    (value) => { chosen = Number(value); draw(width); });
  const inner = body(host, html("div", { class: "controls" }, dayLabel, ownLabel));
  explorers.set(site, (at, key) => {
    day = at;
    chosen = site.runs.findIndex((run) => run.key === key);
    daySelect.value = day;
    ownSelect.value = chosen;
    draw(width);
    host.scrollIntoView({ block: "nearest" });
  });
  const hours = (values) => stairs(values, STEP_H);
  const draw = (now) => {
    width = now;
    const own = shown[chosen];
    if (chosen < site.runs.length) run = own;
    const compared = [...new Set([own, run, policy(site, "rbc_b"), policy(site, "optimum")])];
    const flows = own.schedule, pv = site.pv_kw[day], load = site.load_kw[day], carbon = site.carbon[day];
    const every = width > 560 ? 3 : 6;
    const axis = (label) => ({
      range: [0, 24], label, ticks: Array.from({ length: 24 / every + 1 }, (_, i) => [i * every, `${i * every}:00`]),
    });
    const areas = [];
    const panel = (title, entries, height, y, draws) => {
      const box = html("div", { class: "panel" });
      if (entries.length) box.append(legend(entries, Math.max(entries.length, MOST_COMPARED)));
      const area = plot(box, { width, height, x: axis("time of day"), y, name: `${title}, ${own.title}, ${site.days[day]}` });
      draws(area);
      areas.push(area);
      return box;
    };
    const powers = [
      ["EV charging", "ev", flows.ev_kw[day]], ["battery (charging +)", "battery", flows.battery_kw[day]],
      ["grid import", "grid", flows.grid_import_kw[day]], ["building load", "load", load],
    ];
    const range = extent([0, ...pv, ...powers.flatMap(([, , values]) => values)]);
    const power = panel("Power",
      [{ text: "PV available", look: "area pv", kind: "area" },
        ...powers.map(([text, name]) => ({ text, look: name, kind: "line" }))],
      320, { range, label: "power, kW" }, (area) => {
        const path = [[0, 0], ...hours(pv), [24, 0]];
        shape(area.svg, "path", {
          class: "area pv", d: "M" + path.map(([x, y]) => `${area.x(x).toFixed(1)} ${area.y(y).toFixed(1)}`).join("L"),
        });
        const zero = area.y(0);
        shape(area.svg, "line", { class: "axis", x1: area.left, x2: area.right, y1: zero, y2: zero });
        for (const [, name, values] of [...powers].reverse()) line(area, hours(values), name);
      });
    const names = compared.map((one) => ({ text: one.title, look: one.look, kind: "line" }));
    const soc = panel("SoC", names, 190, { range: [0, 100], label: "battery SoC, %" }, (area) => {
      for (const one of [...compared].reverse()) {
        const levels = [site.soc_start[day], ...one.schedule.soc[day]];
        line(area, levels.map((value, i) => [i * STEP_H, 100 * value]), one.look);
      }
    });
    const intensity = panel("Carbon intensity", [], 150,
      { range: extent(carbon, 0), label: "carbon intensity of the grid, kg/kWh" },
      (area) => line(area, hours(carbon), "carbon"));
    const sums = compared.map((one) => {
      let sum = 0;
      return [0, ...one.schedule.co2_kg[day].map((kg) => (sum += kg))];
    });
    const total = panel("Cumulative CO2", names, 220,
      { range: extent(sums.flat(), 0), label: "CO2 since midnight, kg" }, (area) => {
        sums.forEach((values, i) => line(area, values.map((value, at) => [at * STEP_H, value]), compared[i].look));
      });
    const readout = html("output", { class: "readout" });
    const say = (cells) => {
      const empty = Array.from({ length: MOST_COMPARED - compared.length }, () => ["", ""]);
      readout.replaceChildren(...[...cells, ...empty].map(([name, value]) =>
        html("span", name ? { title: name } : {}, `${name} `, html("b", {}, value))));
    };
    const short = (text) => text.replace(/ \(.*/, "");
    const energy = (values) => values.reduce((sum, kw) => sum + kw * STEP_H, 0);
    const tellDay = () => say([
      ["whole day", site.days[day]],
      ["PV available", `${energy(pv).toFixed(0)} kWh`],
      ...powers.map(([text, , values]) => [short(text), `${signed(energy(values), 0)} kWh`]),
      ["mean intensity", `${(carbon.reduce((sum, value) => sum + value, 0) / carbon.length).toFixed(3)} kg/kWh`],
      ["SoC at its end", `${(100 * flows.soc[day].at(-1)).toFixed(0)} %`],
      ...compared.map((one) => [one.title, `${one.co2_kg[day].toFixed(1)} kg`]),
    ]);
    const clock = (at) => `${Math.floor(at / 4)}:${String((at % 4) * 15).padStart(2, "0")}`;
    const tell = (at) => say([
      ["time", `${clock(at)}\u2013${clock(at + 1)}`],
      ["PV available", `${pv[at].toFixed(0)} kW`],
      ...powers.map(([text, , values]) => [short(text), `${signed(values[at], 0)} kW`]),
      ["intensity", `${carbon[at].toFixed(3)} kg/kWh`],
      ["SoC", `${(100 * flows.soc[day][at]).toFixed(0)} %`],
      ...compared.map((one, i) => [`${one.title} so far`, `${sums[i][at + 1].toFixed(1)} kg`]),
    ]);
    tellDay();
    for (const area of areas) {
      area.cursor = shape(area.svg, "line", { class: "cursor", y1: area.top, y2: area.bottom, visibility: "hidden" });
      area.svg.addEventListener("pointermove", (event) => {
        const box = area.svg.getBoundingClientRect();
        const share = ((event.clientX - box.left) * (width / box.width) - area.left) / (area.right - area.left);
        const at = Math.min(pv.length - 1, Math.max(0, Math.floor(share * pv.length)));
        tell(at);
        for (const { cursor, x } of areas) {
          for (const end of ["x1", "x2"]) cursor.setAttribute(end, x((at + 0.5) * STEP_H));
          cursor.setAttribute("visibility", "visible");
        }
      });
      area.svg.addEventListener("pointerleave", () => {
        tellDay();
        for (const { cursor } of areas) cursor.setAttribute("visibility", "hidden");
      });
    }
    inner.replaceChildren(readout, power, soc, intensity, total);
  };
  return draw;
}

function heat(host, site) {
  let what = "battery_kw", width = 0;
  const options = [["battery_kw", "battery power (charging +)"], ["ev_kw", "EV charging power"]];
  const [, label] = choice("Difference in", options, what, (value) => { what = value; draw(width); });
  const inner = body(host, html("div", { class: "controls" }, label));
  const classes = site.soc_classes, [first, end] = site.soc_band;
  const draw = (now) => {
    width = now;
    const limit = site.heat_limit_kw[what];
    const tint = (value) => ({
      class: value < 0 ? "minus" : "plus", "fill-opacity": Math.min(1, Math.abs(value) / limit).toFixed(3),
    });
    const wide = width > 720 && site.runs.length > 1, each = wide ? (width - 24) / 2 : width;
    const panels = html("div", { class: wide ? "two" : "" });
    for (const run of site.runs) {
      const panel = html("div", { class: "panel" });
      if (site.runs.length > 1) panel.append(html("h4", {}, run.title));
      const every = each > 430 ? 3 : 6;
      const area = plot(panel, {
        width: each, height: 280, name: `${options.find(([key]) => key === what)[1]}: ${run.title} minus RBC B`,
        x: { range: [0, 24], label: "time of day", ticks: Array.from({ length: 24 / every + 1 }, (_, i) => [i * every, `${i * every}:00`]) },
        y: { range: [(100 * first) / classes, (100 * end) / classes], label: "battery SoC, %" },
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
          shape(cell, "title", {}, `${hour}:00\u2013${hour + 1}:00, SoC ${(100 * level) / classes}\u2013${(100 * (level + 1)) / classes} %: ` +
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

const CHARTS = { intervals, learning, days, explorer, heat, sessions };
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
