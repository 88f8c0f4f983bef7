// What the engine does: asks for /metrics once a second while the page is seen, and draws the last minute.

import { ask } from "./service.js";

const SECONDS = 60, EVERY = 1000; // ms
const WIDTH = 120, HEIGHT = 32; // of a drawing, in its own units
const MOST_CELLS = 64;
const METRIC = /^llama_(\w+)\{model_name="((?:[^"\\]|\\.)*)"\} (\S+)$/gm;
const at = id => document.getElementById(id);

// Each drawing: the value of a sample, the least height of its scale, and how a value is written.
const DRAWINGS = [
  { id: "rate", value: sample => sample.rate, least: () => 1, words: value => value < 10 ? value.toFixed(1) : value.toFixed(0) },
  { id: "seats", value: sample => sample.slots_in_use, least: sample => sample.slots_limit,
    words: (value, sample) => `${value} of ${sample.slots_limit}` },
  { id: "rows", value: sample => sample.num_requests_running, least: sample => sample.slots_limit, words: String },
  { id: "waiting", value: sample => sample.num_requests_waiting, least: () => 4, words: String },
  { id: "cache", value: sample => 100 * sample.kv_cache_usage_perc, least: () => 5, words: value => `${value.toFixed(0)} %` },
];

// model, key: functions that give what is chosen on the page. Returns a function that asks at once.
export function watch(model, key) {
  let samples = [], timer = 0, last = "";

  async function poll() {
    clearTimeout(timer);
    if (document.hidden) return;
    try {
      const text = await (await ask("metrics", key())).text();
      if (model() !== last) [samples, last] = [[], model()];
      samples = withNext(samples, read(text, last));
      show(samples);
      tell("");
    } catch (error) {
      tell(error.status === 401 ? "The numbers need the API key." : error.message);
      if (error.status === 401) return; // until there is another key
    }
    clearTimeout(timer);
    timer = setTimeout(poll, EVERY);
  }

  document.addEventListener("visibilitychange", poll);
  poll();
  return poll;
}

// The numbers of a model by their names; of the first model when none has that name. Null while nothing is served.
function read(text, model) {
  const models = new Map();
  for (const [, name, label, value] of text.matchAll(METRIC)) {
    const owner = label.replace(/\\(.)/g, (_, char) => char === "n" ? "\n" : char);
    if (!models.has(owner)) models.set(owner, { time: performance.now() / 1000 });
    models.get(owner)[name] = Number(value);
  }
  return models.get(model) ?? models.values().next().value ?? null;
}

// The samples of the last minute, and one more. Its rate is that of the tokens since the one before.
function withNext(samples, next) {
  if (!next) return [];
  const before = samples.at(-1);
  if (before && next.time - before.time < 0.3) return samples; // too soon for a rate
  const tokens = before ? next.generation_tokens_total - before.generation_tokens_total : 0;
  next.rate = tokens > 0 ? tokens / (next.time - before.time) : 0; // below 0: the server was started again
  return [...samples.filter(sample => sample.time > next.time - SECONDS - 2), next];
}

function tell(trouble) {
  at("trouble").textContent = trouble;
  at("trouble").hidden = !trouble;
}

function show(samples) {
  const now = samples.at(-1);
  if (!now) return;
  at("slots").textContent = `slots: ${now.slots_in_use} of ${now.slots_limit} in use`;
  showCells(now);
  for (const { id, value, least, words } of DRAWINGS) {
    const points = samples.map(sample => [WIDTH * (1 - (now.time - sample.time) / SECONDS), value(sample)]);
    const top = Math.max(least(now), ...points.map(([, y]) => y)) * 1.08;
    const figure = at(id), text = words(value(now), now), peak = words(Math.max(...points.map(([, y]) => y)), now);
    figure.querySelector("output").textContent = text;
    figure.querySelector("svg").setAttribute("aria-label", `now ${text}, at most ${peak} in the last minute`);
    draw(figure.querySelector("svg"), points.map(([x, y]) => [x.toFixed(2), (HEIGHT - 1 - (HEIGHT - 2) * y / top).toFixed(2)]));
  }
}

// A line, the area below it, and a dot at its end.
function draw(svg, points) {
  if (!svg.firstChild) {
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    for (const part of ["area", "line", "dot"]) {
      svg.append(document.createElementNS(svg.namespaceURI, "path"));
      svg.lastChild.setAttribute("class", part);
    }
  }
  const [area, line, dot] = svg.children, path = `M${points.map(point => point.join(" ")).join("L")}`;
  area.setAttribute("d", `${path}V${HEIGHT}H${points[0][0]}Z`);
  line.setAttribute("d", path);
  dot.setAttribute("d", `M${points.at(-1).join(" ")}h0`);
}

// A cell for each slot; for several, where there are many.
function showCells({ slots_limit: slots, slots_in_use: used }) {
  const cells = at("seats").querySelector(".cells"), count = Math.min(slots, MOST_CELLS);
  while (cells.children.length < count) cells.append(document.createElement("i"));
  while (cells.children.length > count) cells.lastChild.remove();
  [...cells.children].forEach((cell, i) => cell.classList.toggle("on", i < Math.ceil(used * count / slots)));
}
