// Requests to the server. Every URL is relative, so the page works behind a proxy, under any path and scheme.

// Why there is no answer, in words. status: that of HTTP, or 0 when the server could not be reached.
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// The answer of the server. Throws Failure, and AbortError when options.signal aborts.
export async function ask(url, key, options = {}) {
  const headers = { ...(options.body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  let answer;
  try {
    answer = await fetch(url, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Failure("The server cannot be reached. Is it running?");
  }
  if (!answer.ok) throw await failure(answer);
  return answer;
}

async function failure(answer) {
  let message = `The server answered with status ${answer.status}.`;
  try { message = (await answer.json()).error.message; } catch { /* a proxy answered, and not in our form */ }
  const ms = answer.headers.get("retry-after-ms") ?? 1000 * (answer.headers.get("retry-after") ?? 0);
  return new Failure(message + (ms > 0 ? ` (try again in ${duration(ms / 1000)})` : ""), answer.status);
}

function duration(seconds) {
  return seconds < 10 ? `${seconds.toFixed(1)} s` : seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`;
}

// The objects of a stream of server-sent events; anything but data lines is a comment. Throws Failure.
export async function* events(body) {
  let rest = "";
  for await (const text of pieces(body.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
  throw new Failure("The answer broke off.");
}

async function* pieces(stream) {
  const reader = stream.getReader();
  try {
    for (let part; !(part = await reader.read()).done;) yield part.value;
  } catch (error) {
    throw error.name === "AbortError" ? error : new Failure("The connection broke off.");
  }
}
