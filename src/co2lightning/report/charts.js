"use strict";
// Elements, scales, axes and legends. Text enters the page as text only, never as markup.

function html(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function shape(parent, name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    found.push([i * step, signed(i * step, digits)]);
  }
  return found;
}

function signed(value, digits, plus = "") {
  const text = value.toFixed(digits);
  if (!Number(text)) return (0).toFixed(digits);
  return text.startsWith("-") ? "\u2212" + text.slice(1) : plus + text;
}

const ruler = document.createElement("canvas").getContext("2d");
ruler.font = `12px ${getComputedStyle(document.body).fontFamily}`;

/** Return the width that names of rows need beside a plot; long ones will be cut. */
function gutter(names, width) {
  return Math.min(170, width * 0.38, 14 + Math.max(...names.map((name) => ruler.measureText(name).width)));
}

/** Write the name of a row so that it ends at `x`, cut where it is too long. */
function rowName(svg, x, y, name) {
  let text = name;
  for (let kept = name.length - 1; kept > 0 && ruler.measureText(text).width > x; kept--) {
    text = name.slice(0, kept) + "\u2026";
  }
  const node = shape(svg, "text", { class: "value", x, y, "text-anchor": "end" }, text);
  if (text !== name) shape(node, "title", {}, name);
}

/**
 * Return [low, high] around values, with room for the largest mark at both ends. `from`, where
 * there is one, lies inside; nothing is added below it.
 */
function extent(values, from = null) {
  const all = [...values.filter((value) => value !== null), ...(from === null ? [] : [from])];
  if (!all.length) return [0, 1];
  const low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
  const room = (high - low || Math.abs(high) || 1) * 0.07;
  return [low === from ? low : low - room, high + room];
}

/**
 * Make a plot with axes. `x` and `y`: {range, label, ticks?}; a y axis without label has none.
 * Returns {svg, x, y, left, right, top, bottom} where x and y map values to pixels.
 */
function plot(parent, { width, height, x, y, name, left = 46 }) {
  const right = width - 14, top = y.label ? 24 : 6, bottom = height - (x.label ? 40 : 22);
  const svg = shape(parent, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  shape(svg, "title", {}, name);
  const map = ([low, high], from, to) => (value) =>
    from + ((value - low) / (high - low)) * (to - from);
  const px = map(x.range, left, right), py = map(y.range, bottom, top);
  const xTicks = x.ticks || ticks(...x.range, (right - left) / 60);
  for (const [value, text] of xTicks) {
    const at = px(value).toFixed(1);
    shape(svg, "line", { class: "tick", x1: at, x2: at, y1: top, y2: bottom });
    const half = text.length * 3.4;
    const anchor = px(value) + half > width ? "end" : px(value) - half < 0 ? "start" : "middle";
    const place = anchor === "end" ? width : anchor === "start" ? 0 : at;
    shape(svg, "text", { x: place, y: bottom + 16, "text-anchor": anchor }, text);
  }
  if (y.label) {
    for (const [value, text] of y.ticks || ticks(...y.range, (bottom - top) / 32)) {
      const at = py(value).toFixed(1);
      shape(svg, "line", { class: "tick", x1: left, x2: right, y1: at, y2: at });
      shape(svg, "text", { x: left - 6, y: +at + 4, "text-anchor": "end" }, text);
    }
    shape(svg, "text", { x: 0, y: 13 }, y.label);
  }
  if (x.label) {
    shape(svg, "text", { x: right, y: height - 5, "text-anchor": "end" }, x.label);
  }
  shape(svg, "line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom });
  return { svg, x: px, y: py, left, right, top, bottom };
}

/** Draw a line through [x, y] points; a null point interrupts it. */
function line(area, points, look) {
  let path = "", pen = "M";
  for (const point of points) {
    if (point) path += pen + area.x(point[0]).toFixed(1) + " " + area.y(point[1]).toFixed(1);
    pen = point ? "L" : "M";
  }
  return shape(area.svg, "path", { class: `line ${look}`, d: path });
}

/** Return the points of values that hold throughout a step of `step` each. */
function stairs(values, step) {
  return values.flatMap((value, i) => [[i * step, value], [(i + 1) * step, value]]);
}

const MARKS = {
  dot: (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
  square: (x, y, r) => `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
  triangle: (x, y, r) => `M${x} ${y - r}L${x + r} ${y + r}H${x - r}Z`,
  dash: (x, y, r) => `M${x - r} ${y - 1.2}h${2 * r}v2.4h${-2 * r}Z`,
};

function mark(svg, kind, x, y, size, look) {
  const round = (value) => Math.round(value * 10) / 10;
  return shape(svg, "path", { class: look, d: MARKS[kind](round(x), round(y), size) });
}

/**
 * Make a legend of {text, look, kind}; kind: "line", "area" or one of MARKS. With `places`, it has
 * the height of so many entries whatever they say.
 */
function legend(entries, places = 0) {
  const list = html("ul", { class: places ? "legend fixed" : "legend" });
  for (const { text, look, kind } of entries) {
    const item = html("li");
    const svg = shape(item, "svg", { viewBox: "0 0 30 12", "aria-hidden": "true" });
    if (kind === "line") shape(svg, "path", { class: `line ${look}`, d: "M1 6H29" });
    else if (kind === "area") shape(svg, "rect", { class: look, x: 3, y: 1, width: 24, height: 10 });
    else mark(svg, kind, 15, 6, 5, look);
    item.append(text);
    if (places) item.title = text;
    list.append(item);
  }
  while (list.children.length < places) list.append(html("li", { "aria-hidden": "true" }));
  return list;
}

/** Make a labelled select of [value, text] pairs. */
function choice(label, options, chosen, changed) {
  const select = html("select");
  for (const [value, text] of options) select.append(html("option", { value }, text));
  select.value = chosen;
  select.addEventListener("change", () => changed(select.value));
  return [select, html("label", {}, label, select)];
}
