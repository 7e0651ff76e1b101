"use strict";
// Drawing: plain values in, SVG, canvas and text out. Nothing here asks the server for anything, and text from it is
// only ever set as text.

const RANK_COLORS = 4;
const find = (selector) => document.querySelector(selector);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function shape(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Numbers for people.

function bytes(count) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  const power = count ? Math.min(units.length - 1, Math.floor(Math.log10(count) / 3)) : 0;
  const value = count / 1000 ** power;
  return [value < 10 && power ? value.toFixed(1) : Math.round(value).toString(), units[power]];
}

function duration(us) {
  if (us === null || us === undefined) return ["–", ""];
  if (us === 0) return ["0", "µs"];
  if (us >= 1e6) return [(us / 1e6).toFixed(1), "s"];
  if (us >= 1000) return [(us / 1000).toFixed(us < 1e4 ? 1 : 0), "ms"];
  return [us < 10 ? us.toFixed(1) : Math.round(us).toString(), "µs"];
}

function count(value) {
  return value < 1e5 ? value.toLocaleString("en") : `${(value / 1000).toFixed(0)}k`;
}

function span(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} d`;
}

const rate = (value) => (value < 100 ? value.toFixed(1) : Math.round(value).toString());

// Figures: a list of [name, value, unit].

function drawFigures(list, figures) {
  while (list.children.length < figures.length) {
    list.append(element("div", {}, element("dt"), element("dd", {}, "", element("small"))));
  }
  while (list.children.length > figures.length) list.lastChild.remove();
  figures.forEach(([name, value, unit], i) => {
    const [term, data] = list.children[i].children;
    term.textContent = name;
    data.firstChild.textContent = value;
    data.lastChild.textContent = unit;
  });
}

// Machines: hosts as boxes, ranks in them, a line wherever rows are exchanged.

// What a distant host's state means for its ranks.
const STATES = { "in the group": "running", leads: "running", joined: "running" };

function hostsOf(status) {
  const group = status.group ?? { ranks: [] };
  const own = { name: status.host, note: status.hosts?.role === "joined" ? "" : "this machine", ranks: group.ranks };
  const others = (status.hosts?.hosts ?? []).map((host) => ({
    name: host.name,
    note: host.state + (host.reason ? `: ${host.reason}` : ""),
    away: !["in the group", "leads", "joined"].includes(host.state),
    route: host.route,
    ranks: Array.from({ length: host.ranks ?? 1 }, () => ({ id: null, state: STATES[host.state] ?? host.state })),
  }));
  return [own, ...others];
}

function drawMachines(place, status) {
  const width = Math.max(280, place.clientWidth);
  const hosts = hostsOf(status);
  const upright = width < 560 && hosts.length > 1;
  const gap = upright ? 62 : hosts.length > 2 ? 110 : 150;
  const rankHeight = 64;
  const boxWidth = upright || hosts.length === 1 ? width - 2 : (width - gap * (hosts.length - 1) - 2) / hosts.length;
  const boxHeight = rankHeight + 46;
  const height = upright ? hosts.length * boxHeight + (hosts.length - 1) * gap : boxHeight + 2;
  const drawing = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  drawing.append(shape("title", {}, describeMachines(status, hosts)));
  const busy = (status.engine?.running ?? 0) > 0 && (status.engine?.exchange.num ?? 0) > 0;
  let number = 0;
  hosts.forEach((host, i) => {
    const x = upright ? 1 : 1 + i * (boxWidth + gap);
    const y = upright ? 1 + i * (boxHeight + gap) : 1;
    if (i) drawCable(drawing, upright, { x, y, boxWidth, boxHeight, gap }, host, status, busy);
    number = drawHost(drawing, host, { x, y, boxWidth, boxHeight, rankHeight }, number, status, busy);
  });
  place.replaceChildren(drawing);
}

function describeMachines(status, hosts) {
  const parts = hosts.map((host) => `${host.name} with ${host.ranks.length} rank(s), ${host.note}`);
  const [p50, unit] = duration(status.engine?.exchange.p50_us);
  return `${parts.join("; ")}. An exchange waits ${p50} ${unit}.`;
}

function drawHost(drawing, host, box, number, status, busy) {
  const { x, y, boxWidth, boxHeight, rankHeight } = box;
  const away = host.away ? " away" : "";
  drawing.append(shape("rect", { class: `host${away}`, x, y, width: boxWidth, height: boxHeight - 2, rx: 7 }));
  drawing.append(label(x + 12, y + 21, host.name, "name"));
  const room = Math.floor((boxWidth - 30) / 6.4) - host.name.length;
  drawing.append(label(x + boxWidth - 12, y + 21, cut(host.note, room), "", "end"));
  const between = 118;
  const n = Math.max(1, host.ranks.length);
  const rankWidth = Math.min(240, (boxWidth - 24 - between * (n - 1)) / n);
  const start = x + (boxWidth - n * rankWidth - (n - 1) * between) / 2;
  host.ranks.forEach((rank, i) => {
    const left = start + i * (rankWidth + between);
    if (i) drawMailbox(drawing, left - between, left, y + 32 + rankHeight / 2, status, busy);
    const color = (rank.rank ?? number) % RANK_COLORS;
    drawRank(drawing, rank, { x: left, y: y + 32, width: rankWidth, height: rankHeight - 4 }, color, number);
    number += 1;
  });
  return number;
}

function drawRank(drawing, rank, box, color, number) {
  const dead = rank.state === "dead" ? " dead" : "";
  drawing.append(shape("rect", { class: `rank r${color}${dead}`, ...box, rx: 5 }));
  const name = `rank ${rank.rank ?? rank.id ?? number}`;
  drawing.append(label(box.x + 11, box.y + 24, name, "name"));
  if (rank.rank === 0) drawing.append(label(box.x + box.width - 11, box.y + 24, "leads", "", "end"));
  drawing.append(label(box.x + 11, box.y + 45, rank.state, ""));
  if (rank.memory_bytes && box.width > 130) {
    drawing.append(label(box.x + box.width - 11, box.y + 45, bytes(rank.memory_bytes).join(" "), "mono", "end"));
  }
}

function drawMailbox(drawing, from, to, y, status, busy) {
  const exchange = status.engine?.exchange;
  line(drawing, `M${from} ${y}H${to}`, busy);
  drawing.append(label((from + to) / 2, y - 9, duration(exchange?.p50_us).join(" "), "mono", "middle"));
  drawing.append(label((from + to) / 2, y + 17, `p99 ${duration(exchange?.p99_us).join(" ")}`, "", "middle"));
}

function drawCable(drawing, upright, box, host, status, busy) {
  const link = status.hosts?.link ?? "none";
  const kind = host.away || link === "none" ? "no link" : link;
  const live = duration(status.engine?.exchange.p50_us ?? host.route?.p50_us).join(" ");
  const route = host.route ? `p50 ${duration(host.route.p50_us).join(" ")} when measured` : "";
  if (upright) {
    const x = box.x + 30;
    line(drawing, `M${x} ${box.y - box.gap}V${box.y}`, busy && !host.away);
    drawing.append(label(x + 14, box.y - box.gap / 2 - 5, `${kind}, ${live}`, "mono"));
    drawing.append(label(x + 14, box.y - box.gap / 2 + 14, route, ""));
    return;
  }
  const [middle, y] = [box.x - box.gap / 2, box.y + box.boxHeight / 2];
  line(drawing, `M${box.x - box.gap} ${y}H${box.x}`, busy && !host.away);
  drawing.append(label(middle, y - 10, live, "mono", "middle"));
  drawing.append(label(middle, y + 18, kind, "", "middle"));
}

function line(drawing, d, busy) {
  drawing.append(shape("path", { class: "cable", d }));
  if (busy) drawing.append(shape("path", { class: "flow", d }));
}

function label(x, y, text, kind, anchor = "start") {
  return shape("text", { x, y, class: kind, "text-anchor": anchor }, text);
}

const cut = (text, room) => (text.length > room ? `${text.slice(0, Math.max(0, room - 1))}…` : text);

// Splits: what decode and prefill are divided by, and among whom.

const MEANING = {
  solo: "one rank computes all of it",
  experts: "each token's chosen experts are divided among the ranks",
  tokens: "the tokens are divided among the ranks",
  sequences: "whole requests are divided among the ranks",
};

function drawSplits(list, status) {
  const splits = status.engine?.splits ?? {};
  const rows = Object.entries(splits).filter(([, split]) => split);
  const asked = status.group?.split;
  const shown = rows.length ? rows : asked ? [["asked for", asked]] : [];
  list.replaceChildren(
    ...shown.flatMap(([kind, split]) => {
      const shares = split === "solo" ? [1] : (status.group?.fractions ?? status.group?.shares ?? [1]);
      const bar = element("div", { class: "bar", "aria-hidden": "true" });
      shares.forEach((share, i) => {
        const part = element("span", { class: `f${i % RANK_COLORS}` });
        part.style.flex = share;
        bar.append(part);
      });
      return [
        element("dt", {}, kind),
        element("dd", { class: "split" }, split),
        element("dd", {}, rows.length ? bar : ""),
        element("dd", { class: "meaning" }, MEANING[split] ?? ""),
      ];
    }),
  );
}

// The chart of speed. `state` keeps the points and the cursor between two drawings.

function niceCeiling(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= value);
}

// Generated tokens as a curve; below it, on a scale of its own, a lane for the prompts, which are read far faster.
function drawChart(place, points, events, seconds, cursor) {
  const [width, height, left] = [Math.max(280, place.clientWidth), 196, 38];
  const [base, lane] = [140, 18]; // where the curve stands; the lane hangs from base + 8
  const foot = base + 8 + lane;
  const top = niceCeiling(Math.max(10, ...points.map((p) => p.generated_per_s)));
  const mostRead = Math.max(1, ...points.map((p) => p.read_per_s));
  const end = points.at(-1)?.at ?? Date.now() / 1000;
  const x = (at) => left + (width - left - 4) * (1 - (end - at) / seconds);
  const y = (value) => 8 + (base - 8) * (1 - value / top);
  const drawing = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  for (const part of [0, 0.5, 1]) {
    drawing.append(shape("path", { class: "grid", d: `M${left} ${y(top * part)}H${width}` }));
    drawing.append(label(left - 7, y(top * part) + 4, `${+(top * part).toPrecision(3)}`, "", "end"));
  }
  drawing.append(label(left - 7, foot - 3, "read", "", "end"));
  drawTimes(drawing, x, end, seconds, width - left, height - 5);
  for (const event of events.filter((e) => e.kind !== "plan" && x(e.at) > left)) {
    drawing.append(shape("path", { class: "event", d: `M${x(event.at)} 8V${foot}` }));
  }
  const seen = points.filter((p) => x(p.at) >= left);
  if (seen.length > 1) {
    const curve = `M${seen.map((p) => `${x(p.at).toFixed(1)} ${y(p.generated_per_s).toFixed(1)}`).join("L")}`;
    drawing.append(shape("path", { class: "area", d: `${curve}V${base}H${x(seen[0].at)}Z` }));
    const bars = seen.filter((p) => p.read_per_s > 0);
    const bar = (p) => `M${x(p.at).toFixed(1)} ${foot}v-${Math.max(1.5, (lane * p.read_per_s) / mostRead).toFixed(1)}`;
    const thick = Math.max(1.2, (width - left) / seconds);
    drawing.append(shape("path", { class: "read", "stroke-width": thick, d: bars.map(bar).join("") }));
    drawing.append(shape("path", { class: "curve", d: curve }));
  }
  if (cursor) drawing.append(shape("path", { class: "cursor", d: `M${x(cursor.at)} 8V${foot}` }));
  place.replaceChildren(drawing);
  return { pick: (px) => nearest(seen, end - (1 - (px - left) / (width - left - 4)) * seconds), seen };
}

function drawTimes(drawing, x, end, seconds, width, y) {
  const step = [10, 30, 60, 120, 300].find((s) => (width * s) / seconds > 70);
  for (let back = 0; back < seconds; back += step) {
    const text = back ? `−${span(back)}` : "now";
    drawing.append(label(x(end - back), y, text, "", back ? "middle" : "end"));
  }
}

function nearest(points, at) {
  return points.reduce((best, p) => (!best || Math.abs(p.at - at) < Math.abs(best.at - at) ? p : best), null);
}

function describePoint(point, end) {
  const [p50, unit] = duration(point.p50_us);
  const waits = point.p50_us === null ? "" : `, exchanges wait ${p50} ${unit}`;
  const ago = end - point.at < 1 ? "now" : `${span(end - point.at)} ago`;
  return `${ago}: ${rate(point.generated_per_s)} generated, ${rate(point.read_per_s)} read, ${point.open} open${waits}`;
}

// The heat map: a row per layer, a column per expert, against the layer's mean.

class HeatMap {
  constructor(canvas, readout) {
    Object.assign(this, { canvas, readout, layers: [], cursor: null });
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.move(null));
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  // experts: {layer: [counts]}; a layer's missing experts were never chosen.
  show(experts, numExperts) {
    this.layers = Object.entries(experts).map(([layer, chosen]) => {
      const counts = Array.from({ length: Math.max(numExperts, chosen.length) }, (_, i) => chosen[i] ?? 0);
      const total = counts.reduce((a, b) => a + b, 0);
      return { layer, counts, total, ratios: counts.map((n) => (total ? (n * counts.length) / total : 0)) };
    });
    this.draw();
    this.canvas.setAttribute("aria-label", this.summary());
  }

  summary() {
    if (!this.layers.length) return "No expert load yet";
    const peak = this.layers.map((l) => [Math.max(...l.ratios), l]).reduce((a, b) => (b[0] > a[0] ? b : a));
    const expert = peak[1].ratios.indexOf(peak[0]);
    return (
      `Expert load of ${this.layers.length} layers with ${peak[1].counts.length} experts. ` +
      `Busiest: expert ${expert} of layer ${peak[1].layer}, ${peak[0].toFixed(1)} times the mean.`
    );
  }

  size() {
    const columns = Math.max(1, ...this.layers.map((l) => l.counts.length));
    const width = this.canvas.clientWidth;
    const row = Math.max(3, Math.min(16, Math.floor(260 / Math.max(1, this.layers.length))));
    return { columns, width, row, column: width / columns, height: Math.max(16, row * this.layers.length) };
  }

  draw() {
    const { width, row, column, height } = this.size();
    const scale = window.devicePixelRatio || 1;
    this.canvas.style.height = `${height}px`;
    [this.canvas.width, this.canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const edge = row > 6 && column > 6 ? 1 : 0;
    this.layers.forEach(({ ratios }, i) => {
      ratios.forEach((ratio, j) => {
        context.fillStyle = heat(ratio);
        context.fillRect(j * column, i * row, column - edge, row - edge);
      });
    });
    if (this.cursor) {
      context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--ink");
      context.lineWidth = 1.5;
      context.strokeRect(this.cursor.expert * column, this.cursor.row * row, column, row);
    }
  }

  move(cursor) {
    this.cursor = cursor;
    this.draw();
    const layer = cursor && this.layers[cursor.row];
    this.readout.textContent = layer
      ? `layer ${layer.layer}, expert ${cursor.expert}: chosen ${layer.counts[cursor.expert]} times, ` +
        `${layer.ratios[cursor.expert].toFixed(2)} times the mean`
      : "";
  }

  point(event) {
    const { row, column } = this.size();
    const at = this.bounded(Math.floor(event.offsetY / row), Math.floor(event.offsetX / column));
    if (at) this.move(at);
  }

  key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step || !this.layers.length) return;
    event.preventDefault();
    const { row, expert } = this.cursor ?? { row: 0, expert: 0 };
    this.move(this.cursor ? this.bounded(row + step[0], expert + step[1]) : { row, expert });
  }

  bounded(row, expert) {
    if (!this.layers.length) return null;
    const y = Math.min(Math.max(row, 0), this.layers.length - 1);
    return { row: y, expert: Math.min(Math.max(expert, 0), this.layers[y].counts.length - 1) };
  }
}

// From the ground over amber to the ink: light carries the meaning, so that colour-blind eyes read it too.
function heat(ratio) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const t = Math.min(1, Math.max(0, ratio) / 4);
  const stops = dark
    ? [[30, 29, 27], [92, 58, 20], [184, 120, 34], [240, 186, 92], [255, 240, 205]]
    : [[239, 236, 228], [243, 214, 158], [222, 158, 62], [160, 92, 12], [72, 34, 6]];
  const at = t * (stops.length - 1);
  const [low, part] = [Math.min(Math.floor(at), stops.length - 2), at - Math.min(Math.floor(at), stops.length - 2)];
  const mixed = stops[low].map((c, i) => Math.round(c + (stops[low + 1][i] - c) * part));
  return `rgb(${mixed.join(" ")})`;
}

// Memory, planner, events.

function meter(list, name, part, whole, text, color) {
  const bar = element("div", { class: "bar", "aria-hidden": "true" });
  const filled = element("span", { class: color });
  filled.style.width = `${whole ? Math.min(100, (100 * part) / whole) : 0}%`;
  bar.append(filled);
  list.push(element("dt", {}, name), element("dd", {}, bar), element("dd", {}, text));
}

function drawMemory(list, status) {
  const [rows, total] = [[], status.memory.total_bytes];
  for (const rank of status.group?.ranks ?? []) {
    const color = `f${(rank.rank ?? rank.id) % RANK_COLORS}`;
    meter(rows, `rank ${rank.id}`, rank.memory_bytes, total, bytes(rank.memory_bytes).join(" "), color);
  }
  if (status.engine) {
    const text = `${bytes(status.engine.kv_bytes).join(" ")}`;
    meter(rows, `caches, ${count(status.engine.kv_tokens)} tokens`, status.engine.kv_bytes, total, text, "f2");
  }
  const used = total - status.memory.available_bytes;
  meter(rows, "machine", used, total, `${bytes(used).join(" ")} of ${bytes(total).join(" ")}`, "f-soft");
  list.replaceChildren(...rows);
}

function drawPlanner(section, planner) {
  const works = Object.entries(planner ?? {});
  section.hidden = !works.length;
  section.querySelector("ul").replaceChildren(
    ...works.map(([work, choice]) => {
      const most = Math.max(...Object.values(choice.costs_ms));
      const costs = element("div", { class: "costs" });
      for (const [split, ms] of Object.entries(choice.costs_ms)) {
        const bar = element("div", { class: split === choice.split ? "bar chosen" : "bar", "aria-hidden": "true" });
        const filled = element("span");
        filled.style.width = `${(100 * ms) / most}%`;
        bar.append(filled);
        costs.append(element("span", {}, split), bar, element("span", {}, duration(ms * 1000).join(" ")));
      }
      return element("li", {}, `${work}: `, element("b", {}, choice.split), " ", element("small", {}, choice.reason), costs);
    }),
  );
}

function drawEvents(list, events) {
  const latest = events.at(-1)?.number;
  if (list.dataset.latest === String(latest)) return;
  list.dataset.latest = latest;
  list.replaceChildren(
    ...[...events].reverse().map((event) => {
      const when = new Date(event.at * 1000);
      const time = element("time", { datetime: when.toISOString() }, when.toLocaleTimeString("en-GB"));
      return element("li", {}, time, element("span", { class: event.kind }, event.text));
    }),
  );
}
