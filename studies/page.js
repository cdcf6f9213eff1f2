// What the pages of studies/ share; studies/page.py puts it into each. A page has elements main, tip and data.
// ---------------------------------------------------------------------------------------------------------------------
// A. Elements. Text from the run is only ever set as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";
function make(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  const absent = child => child === null || child === undefined || child === false;
  element.append(...children.flat(Infinity).filter(child => !absent(child)));
  return element;
}
const h = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => make(document.createElementNS(SVG, tag), attributes, children);
const range = n => Array.from({ length: n }, (_, i) => i);
const whole = x => Math.round(x).toLocaleString("en");
const percent = x => {
  if (x < 0) return "−" + percent(-x);
  if (x >= 0.9995) return "100%";
  return (x >= 0.0995 ? (100 * x).toFixed(1) : x >= 0.00995 ? (100 * x).toFixed(2) : (100 * x).toPrecision(2)) + "%";
};
const short = x => {
  if (x === 0) return "0";
  return Math.abs(x) >= 0.001 && Math.abs(x) < 1e5 ? String(+x.toPrecision(3)) : x.toExponential(1);
};
const signed = x => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);
const fact = (value, what) => h("div", {}, h("b", {}, value), h("span", {}, what));
const share = (part, colour) =>
  h("span", { class: "share", style: `width:${(100 * part).toFixed(1)}%;background:${colour}` });
// Rows of cells: text first, then numbers; a last column without a heading takes what room is left, for bars.
function table(head, rows) {
  const kind = j => head[j] === "" ? "rest" : j ? "num" : null;
  const row = (cells, i) => h("tr", {}, cells.map((cell, j) => h(i ? "td" : "th", { class: kind(j) }, cell)));
  return h("div", { class: "scroll" }, h("table", {}, [head, ...rows].map(row)));
}
const section = (title, note, ...children) =>
  h("section", {}, h("h2", {}, title), h("p", { class: "note" }, note), children);

// ---------------------------------------------------------------------------------------------------------------------
// B. The data: base64 of gzip of a JSON and of arrays, see `pack` in page.py

let D, A;  // JSON; arrays
const ARRAYS = {
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int8: Int8Array, int16: Int16Array, int32: Int32Array,
  float32: Float32Array,
};

async function unpackData() {
  const text = atob(document.getElementById("data").textContent.trim()), packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  D = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  A = {};
  for (const [name, [dtype, at, size]] of Object.entries(D.arrays)) {
    A[name] = new ARRAYS[dtype](buffer, 8 + length + at, size);
  }
}

const kind = matrix => matrix.full.split(".").pop();
const COLOURED = ["q", "k", "v", "o", "up", "down", "total"];
const colour = kind => `var(--k-${COLOURED.includes(kind) ? kind : "none"})`;

// A token in a table: spaces as dots, many of them as one dot and their number. In running text it keeps them.
function token(t) {
  const dotted = part =>
    /^ {4,}$/.test(part) ? ["·", h("small", {}, "×" + part.length)] : part.replaceAll(" ", "·");
  return h("bdi", { class: "token", "aria-label": D.tokens[t] }, D.tokens[t].split(/( {4,})/).map(dotted));
}
const importance = g => g > 0 ? `rgba(var(--g), ${(0.12 + 0.78 * g).toFixed(3)})` : null;

// ---------------------------------------------------------------------------------------------------------------------
// C. Figures

const log10 = Math.log10;
function ticks(low, high, log) {
  if (log && high - low < 2.2) {
    const decades = range(Math.ceil(high) - Math.floor(low) + 1).map(i => i + Math.floor(low));
    return decades.flatMap(decade => [1, 2, 5].map(m => log10(m) + decade)).filter(x => x >= low && x <= high);
  }
  if (log) {
    const all = range(Math.floor(high) - Math.ceil(low) + 1).map(i => i + Math.ceil(low));
    return all.filter((_, i) => i % Math.ceil(all.length / 6) === 0);
  }
  const step = 10 ** Math.floor(log10((high - low) / 3 || 1)), many = (high - low) / step;
  const wide = many > 15 ? 5 * step : many > 6 ? 2 * step : step, first = Math.ceil(low / wide - 1e-9);
  return range(Math.floor(high / wide + 1e-9) - first + 1).map(i => (i + first) * wide);
}
function tickText(x, log) {
  if (!log) return Math.abs(x) >= 1e4 ? short(x) : String(+x.toPrecision(6));
  if (x >= 0 && x < 4) return String(Math.round(10 ** x));
  return x > -3 && x < 0 ? String(+(10 ** x).toPrecision(1)) : `1e${Math.round(x)}`;
}
function extent(values) {
  return [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
}

// lines: [{name, colour, points: [[x, y]], dashed, dots}]; axes in their own unit, logarithmic where asked for.
function chart(lines, { x, y, logX = false, logY = false, level = null, height = 210 }) {
  const W = 460, left = 50, right = W - 8, bottom = height - 34;
  const fx = logX ? log10 : v => v, fy = logY ? log10 : v => v, back = (f, log) => log ? 10 ** f : f;
  const all = lines.flatMap(line => line.points);
  const [x0, x1] = extent(all.map(p => fx(p[0])));
  let [y0, y1] = extent(all.map(p => fy(p[1])).concat(level === null ? [] : [fy(level)]));
  const pad = 0.05 * (y1 - y0 || 1);
  y0 -= pad; y1 += pad;
  const X = v => left + (fx(v) - x0) / (x1 - x0 || 1) * (right - left);
  const Y = v => bottom - (fy(v) - y0) / (y1 - y0) * (bottom - 8);
  const yTick = t => {
    const at = Y(back(t, logY));
    return [s("line", { class: "axis", x1: left, x2: right, y1: at, y2: at }),
      s("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, tickText(t, logY))];
  };
  const xTick = t => s("text", { x: X(back(t, logX)), y: bottom + 15, "text-anchor": "middle" }, tickText(t, logX));
  const levelLine = () =>
    s("line", { x1: left, x2: right, y1: Y(level), y2: Y(level), stroke: "var(--dim)", "stroke-dasharray": "2 3" });
  const drawn = line => [
    s("polyline", { fill: "none", stroke: line.colour, "stroke-width": 1.8, "stroke-dasharray": line.dashed && "5 3",
      points: line.points.map(p => X(p[0]).toFixed(1) + "," + Y(p[1]).toFixed(1)).join(" ") }),
    (line.dots || []).map(p =>
      s("circle", { cx: X(p[0]), cy: Y(p[1]), r: 3.6, fill: line.colour, stroke: "var(--card)" }))];
  const named = line => {
    const style = `border-color:${line.colour};border-top-style:${line.dashed ? "dashed" : "solid"}`;
    return h("span", {}, h("i", { style }), line.name);
  };
  return h("div", {},
    s("svg", { class: "chart", viewBox: `0 0 ${W} ${height}`, role: "img", "aria-label": `${y} against ${x}` },
      ticks(y0, y1, logY).map(yTick), ticks(x0, x1, logX).map(xTick),
      s("text", { x: (left + W) / 2, y: height - 3, "text-anchor": "middle" }, x),
      level === null ? null : levelLine(), lines.map(drawn)),
    h("div", { class: "legend" }, lines.map(named)));
}

// Bars of counts over the bins between low and high; `front`, a part of them, is drawn over them. Height: log10(1 + n).
function histogram(counts, front, low, high, xLabel) {
  const W = 460, H = 150, left = 50, right = W - 8, bottom = H - 34, top = log10(1 + Math.max(1, ...counts));
  const w = (right - left) / counts.length, height = n => log10(1 + n) / top * (bottom - 8);
  const X = v => left + (v - low) / (high - low) * (right - left);
  const edge = i => short(low + i * (high - low) / counts.length);
  const bar = (n, i, fill) => n > 0 && s("rect",
    { x: left + i * w + 0.5, width: Math.max(0.5, w - 1), y: bottom - height(n), height: height(n), fill },
    s("title", {}, `${edge(i)} to ${edge(i + 1)}: ${whole(n)} tokens`));
  const bars = (values, fill) => values.map((n, i) => bar(n, i, fill));
  const yTick = t => {
    const at = bottom - height(10 ** t - 1);
    return [s("line", { class: "axis", x1: left, x2: right, y1: at, y2: at }),
      t > 0 && s("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, whole(10 ** t))];
  };
  return s("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `histogram of ${xLabel}` },
    range(Math.floor(top) + 1).map(yTick),
    bars(counts, front ? "var(--bar-dim)" : "var(--bar)"), front && bars(front, "var(--bar)"),
    s("line", { x1: left, x2: right, y1: bottom, y2: bottom, stroke: "var(--dim)" }),
    ticks(low, high, false).map(t => s("text", { x: X(t), y: bottom + 15, "text-anchor": "middle" }, tickText(t))),
    s("text", { x: (left + W) / 2, y: H - 3, "text-anchor": "middle" }, xLabel));
}

// ---------------------------------------------------------------------------------------------------------------------
// D. What stands beside the pointer; a page that cannot be shown

const main = document.getElementById("main"), tip = document.getElementById("tip");

// Numbers of the token under the pointer, or under a finger
function point(event) {
  const said = event.target.dataset && event.target.dataset.said;
  tip.hidden = !said;
  if (!said) return;
  tip.textContent = said;
  const box = event.target.getClientRects()[0];
  tip.style.left = Math.max(4, Math.min(innerWidth - tip.offsetWidth - 4, box.left)) + "px";
  tip.style.top = (box.top > 44 ? box.top - 28 : box.bottom + 6) + "px";
}
document.addEventListener("pointerover", point);
document.addEventListener("pointerdown", point);

function cannotUnpack(error) {
  main.replaceChildren(h("h1", {}, "This page cannot be shown"),
    h("p", {}, `Its data could not be unpacked (${error.message}). It needs a browser of 2023 or newer.`));
  throw error;
}
