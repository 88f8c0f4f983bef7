// The conversation: what is asked, the answers as they come, and the controls around them.

import { Markdown, copyButton } from "./markdown.js";
import { watch } from "./panel.js";
import { ask, events } from "./service.js";

const at = id => document.getElementById(id);
const key = () => at("key").value.trim(); // it lives in its field only: never stored, and gone with the page

const LOADING = 3000; // ms between questions whether the model is there

// turns: what the model is told. running: stops the answer that is on its way; null without one. An answer belongs to
// the conversation that it was asked in, so one that comes after "New conversation" changes nothing.
const fresh = () => ({ turns: [], running: null });
let conversation = fresh();
let following = true; // the end of the conversation stays in view, unless the reader has scrolled away from it
let contexts = new Map(); // tokens that each model's context has
let notice = null; // why the models are not known

function make(name, kind, text = "") {
  const element = document.createElement(name);
  element.className = kind;
  element.textContent = text;
  return element;
}

// --- showing -------------------------------------------------------------------------------------------------------

function append(...elements) {
  at("talk").append(...elements);
  follow();
}

function follow() {
  if (following) at("talk").scrollTop = at("talk").scrollHeight;
  at("latest").hidden = following;
}

function showError(error) {
  const shown = make("div", "error", error.message);
  shown.setAttribute("role", "alert");
  if (error.status === 401) {
    const button = make("button", "", "Enter an API key");
    button.type = "button";
    button.addEventListener("click", () => { openSheet("settings"); at("key").focus(); });
    shown.append(" ", button);
  }
  append(shown);
  return shown;
}

// An answer on its way: its text as it was written, and what is seen of it.
function newAnswer() {
  const element = make("article", "answer"), box = make("div", "assistant");
  element.setAttribute("aria-busy", "true");
  element.append(box);
  append(element);
  const answer = { element, text: "", reason: null, tokens: 0, asked: null }, markdown = new Markdown(box);
  answer.paint = () => { markdown.show(answer.text); follow(); };
  answer.paintSoon = unhurried(answer.paint);
  return answer;
}

// Calls `draw` at most once a frame, and leaves it at most a fifth of the time.
function unhurried(draw) {
  let due = false, free = 0;
  const frame = now => {
    if (now < free) return requestAnimationFrame(frame);
    due = false;
    const started = performance.now();
    draw();
    free = performance.now() + 4 * (performance.now() - started);
  };
  return () => {
    if (!due) requestAnimationFrame(frame);
    due = true;
  };
}

function finish(answer, error) {
  answer.paint();
  answer.element.removeAttribute("aria-busy");
  const foot = make("footer", "note", ending(answer, error));
  foot.append(copyButton(() => answer.text));
  answer.element.append(foot);
  follow();
}

// Why an answer ended, where it is not complete.
function ending({ reason, tokens, asked }, error) {
  if (error?.name === "AbortError") return "Stopped by you.";
  if (error) return "Not complete: see the error below.";
  if (reason !== "length") return "";
  if (tokens === asked.max_tokens) return `Cut off at max_tokens = ${tokens}.`;
  return `Cut off: the context of ${contexts.get(asked.model)} tokens is full.`;
}

function reflect() {
  const busy = conversation.running !== null;
  at("send").disabled = busy;
  at("stop").disabled = !busy;
}

// --- asking --------------------------------------------------------------------------------------------------------

async function loadModels() {
  try {
    const { data } = await (await ask("v1/models", key())).json(), chosen = at("model").value;
    contexts = new Map(data.map(one => [one.id, one.max_model_len]));
    at("model").replaceChildren(...data.map(one => new Option(one.id, one.id, false, one.id === chosen)));
    notice?.remove();
    return true;
  } catch (error) {
    notice?.remove();
    notice = showError(error);
    if (error.status === 503) setTimeout(loadModels, LOADING);
    return false;
  }
}

function request(turns) {
  const number = id => at(id).value === "" ? undefined : Number(at(id).value);
  const system = at("system").value.trim();
  return {
    model: at("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...turns],
    temperature: number("temperature"), top_p: number("top_p"), max_tokens: number("max_tokens"), seed: number("seed"),
    stop: at("stop_text").value || undefined,
    stream: true, stream_options: { include_usage: true },
  };
}

// Read an answer to its end. Throws Failure, AbortError.
async function receive(answer, turns, signal) {
  const started = performance.now();
  let first = 0;
  answer.asked = request(turns);
  const body = JSON.stringify(answer.asked);
  const response = await ask("v1/chat/completions", key(), { method: "POST", body, signal });
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0], text = choice?.delta.content;
    answer.reason = choice?.finish_reason ?? answer.reason;
    if (text) {
      answer.text += answer.text ? text : text.trimStart();
      answer.tokens += 1;
      first ||= performance.now();
      answer.paintSoon();
    }
    if (event.usage) answer.tokens = event.usage.completion_tokens;
    if (first && !signal.aborted) showSpeed(answer.tokens, first - started, performance.now() - first);
  }
}

function showSpeed(tokens, wait, ms) {
  const rate = tokens > 1 ? `${(1000 * (tokens - 1) / Math.max(ms, 1)).toFixed(0)} tokens/s, ` : "";
  at("numbers").textContent = `${tokens} tokens, ${rate}first after ${wait.toFixed(0)} ms`;
}

async function send() {
  const text = at("text").value.trim(), mine = conversation;
  if (!text || mine.running) return;
  mine.running = new AbortController();
  reflect();
  const ready = at("model").value || await loadModels();
  if (ready && mine === conversation) await converse(mine, text);
  mine.running = null;
  reflect();
}

async function converse(mine, text) {
  const { signal } = mine.running;
  const asked = make("div", "user", text);
  following = true;
  openSheet(null);
  append(asked);
  const answer = newAnswer();
  at("text").value = "";
  if (!matchMedia("(pointer: coarse)").matches) at("text").focus(); // elsewhere the keyboard would cover the answer
  mine.turns.push({ role: "user", content: text });
  let error = null;
  await receive(answer, mine.turns, signal).catch(raised => { error = raised; });
  if (mine !== conversation) return;
  finish(answer, error);
  if (answer.text) {
    mine.turns.push({ role: "assistant", content: answer.text });
  } else { // nothing came: the question does not count, and can be asked again
    mine.turns.pop();
    asked.remove();
    answer.element.remove();
    at("text").value ||= text;
    error ??= new Error("The model ended its answer before the first word.");
  }
  if (error && error.name !== "AbortError") showError(error);
}

// --- controls ------------------------------------------------------------------------------------------------------

// On a narrow page the settings and the engine are sheets over the conversation, one at a time; null closes both.
function openSheet(id) {
  for (const button of document.querySelectorAll(".sheet")) {
    const open = button.getAttribute("aria-controls") === id;
    button.setAttribute("aria-expanded", open);
    at(button.getAttribute("aria-controls")).classList.toggle("open", open);
  }
}

for (const button of document.querySelectorAll(".sheet")) {
  button.addEventListener("click", () => {
    openSheet(button.getAttribute("aria-expanded") === "true" ? null : button.getAttribute("aria-controls"));
  });
}
at("form").addEventListener("submit", event => { event.preventDefault(); send(); });
at("text").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", event => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (conversation.running) conversation.running.abort(); else openSheet(null);
});
at("stop").addEventListener("click", () => conversation.running?.abort());
at("clear").addEventListener("click", () => {
  conversation.running?.abort();
  conversation = fresh();
  at("talk").replaceChildren();
  at("numbers").textContent = "";
  openSheet(null);
  reflect();
});
at("talk").addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = at("talk");
  following = scrollHeight - scrollTop - clientHeight < 48;
  at("latest").hidden = following;
});
at("latest").addEventListener("click", () => { following = true; follow(); });
new ResizeObserver(follow).observe(at("talk"));

const poll = watch(() => at("model").value, key);
at("key").addEventListener("change", () => { loadModels(); poll(); });
at("model").addEventListener("change", poll);
loadModels();
