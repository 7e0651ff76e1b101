// The page's loop: ask for what is new, once a second while somebody looks, and draw it.

const POLL_MS = 1000;
const LOAD_EVERY = 5; // the expert load is large and changes slowly
const MOST_POINTS = 600;
const WINDOWS_S = [60, 120, 300, 600]; // the shortest that holds all points

const seen = { points: [], status: null, round: 0, chart: null, cursor: null, failedAt: null };
const heatMap = new HeatMap(find("#load canvas"), find("#load .readout"));

async function poll() {
  const experts = seen.round++ % LOAD_EVERY === 0;
  const since = seen.points.at(-1)?.number ?? 0;
  const response = await fetch(`/status.json?since=${since}&experts=${experts ? "yes" : "no"}`, {
    headers: headers(),
    signal: AbortSignal.timeout(5000),
  });
  if (response.status === 401) return showKey();
  if (!response.ok) throw new Error(`status ${response.status}`);
  take(await response.json());
}

function take(status) {
  if (seen.status && status.uptime_s < seen.status.uptime_s) seen.points = []; // the server began anew
  seen.status = status;
  seen.points = [...seen.points, ...status.history].slice(-MOST_POINTS);
  if (status.experts) heatMap.show(status.experts, status.ready?.num_experts ?? 0);
  drawAll();
}

function drawAll() {
  const status = seen.status;
  if (!status) return;
  drawHead(status);
  drawFigures(find("#figures dl"), figuresOf(status));
  drawMachines(find("#machines .drawing"), status);
  drawSplits(find("#machines .splits"), status);
  drawSpeed();
  drawMemory(find("#memory dl"), status);
  drawPlanner(find("#planner"), status.group?.planner);
  drawEvents(find("#events ol"), status.events);
}

function drawHead(status) {
  document.title = `${rate(status.speed.generated_per_s)} tokens/s – ${status.model}`;
  setText("#model", status.model);
  const words = { ok: "serving", loading: `loading the model, ${Math.round(100 * status.loaded)} %`, failed: `stopped: ${status.reason}` };
  find("#state").className = status.status;
  setText("#state", `${words[status.status]}, up ${span(status.uptime_s)}`, 60);
  setText("#version", `expertd ${status.version}`);
}

// Set only what changed: screen readers announce every change of a status.
function setText(selector, text) {
  const found = find(selector);
  if (found.textContent !== text) found.textContent = text;
}

function figuresOf(status) {
  const engine = status.engine;
  const [p50, unit] = duration(engine?.exchange.p50_us);
  const [memory, memoryUnit] = bytes((status.group?.ranks ?? []).reduce((sum, r) => sum + r.memory_bytes, 0));
  return [
    ["generated", rate(status.speed.generated_per_s), "tokens/s"],
    ["read", rate(status.speed.read_per_s), "tokens/s"],
    ["split", engine?.splits.decode ?? status.group?.split ?? "–", ""],
    ["streams", engine ? String(engine.running) : "–", engine?.waiting ? `and ${engine.waiting} wait` : ""],
    ["exchange", p50, unit],
    ["in caches", engine ? count(engine.kv_tokens) : "–", "tokens"],
    ["ranks hold", memory, memoryUnit],
    ["epoch", String(status.group?.epoch ?? "–"), ""],
  ];
}

function drawSpeed() {
  const place = find("#speed .drawing");
  const end = seen.points.at(-1)?.at ?? 0;
  const age = end - (seen.points[0]?.at ?? end);
  const window_s = WINDOWS_S.find((s) => s >= age) ?? WINDOWS_S.at(-1);
  seen.chart = drawChart(place, seen.points, seen.status.events, window_s, seen.cursor);
  const rates = seen.points.map((p) => p.generated_per_s);
  const mean = rates.reduce((a, b) => a + b, 0) / Math.max(1, rates.length);
  const summary = `Now ${rate(rates.at(-1) ?? 0)}, mean ${rate(mean)}, highest ${rate(Math.max(0, ...rates))}`;
  place.setAttribute("aria-label", `Tokens per second of the last ${span(window_s)}. ${summary}.`);
  find("#speed .readout").textContent = seen.cursor ? describePoint(seen.cursor, end) : summary;
}

function moveCursor(point) {
  seen.cursor = point;
  drawSpeed();
}

function startSpeed() {
  const place = find("#speed .drawing");
  place.addEventListener("pointermove", (event) => {
    if (seen.chart) moveCursor(seen.chart.pick(event.clientX - place.getBoundingClientRect().left));
  });
  place.addEventListener("pointerleave", () => seen.chart && moveCursor(null));
  place.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const points = seen.chart?.seen ?? [];
    if (!step || !points.length) return;
    event.preventDefault();
    const at = points.findIndex((p) => p.number === seen.cursor?.number);
    moveCursor(points[at < 0 ? points.length - 1 : Math.min(Math.max(at + step, 0), points.length - 1)]);
  });
}

function showKey() {
  find("#key").hidden = false;
}

function startKey() {
  find("#key").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("expertd-key", find("#key-text").value);
    find("#key").hidden = true;
    tick();
  });
}

function trouble(error) {
  seen.failedAt ??= new Date().toLocaleTimeString("en-GB");
  find("#trouble").hidden = false;
  setText("#trouble", `No answer from the server since ${seen.failedAt}; trying again.`);
}

let timer = 0;

async function tick() {
  clearTimeout(timer);
  if (document.visibilityState === "visible") {
    try {
      await poll();
      seen.failedAt = null;
      find("#trouble").hidden = true;
    } catch (error) {
      trouble(error);
    }
  }
  timer = setTimeout(tick, POLL_MS);
}

function colorLegend() {
  document.querySelectorAll(".legend i").forEach((box, i) => {
    box.style.background = heat(i);
  });
}

startChat(
  () => seen.status?.model ?? "",
  () => seen.status?.engine?.splits.decode ?? "",
);
startSpeed();
startKey();
colorLegend();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  colorLegend();
  heatMap.draw();
});
let width = 0;
new ResizeObserver(([entry]) => {
  if (entry.contentRect.width === width) return; // what is drawn changes the height
  width = entry.contentRect.width;
  drawAll();
  heatMap.draw();
}).observe(find("main"));
document.addEventListener("visibilitychange", tick);
tick();
