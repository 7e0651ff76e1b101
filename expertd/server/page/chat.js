// The chat box: streams through /v1/chat/completions, or /v1/completions where the model has no chat template.

const turns = [];
let asking = null; // the AbortController of the answer that comes
let plain = false; // the model has no chat template

function headers() {
  const key = sessionStorage.getItem("expertd-key");
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

// The JSON objects of a stream of server-sent events. Throws what an "error" among them says.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function post(model, signal) {
  const [temperature, max_tokens] = [+find("#temperature").value, +find("#max-tokens").value];
  const options = { model, stream: true, stream_options: { include_usage: true }, temperature, max_tokens };
  const [path, body] = plain
    ? ["/v1/completions", { ...options, prompt: turns.map((t) => t.content).join("") }]
    : ["/v1/chat/completions", { ...options, messages: turns }];
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (response.ok) return response;
  const message = (await response.json().catch(() => null))?.error?.message ?? response.statusText;
  if (response.status === 400 && !plain && message.includes("chat template")) {
    plain = true;
    return post(model, signal);
  }
  if (response.status === 401) showKey();
  throw new Error(message);
}

function say(kind, text) {
  find("#log .empty")?.remove();
  const said = element("p", { class: kind }, text);
  find("#log").append(said);
  return said;
}

function busy(on) {
  find("#stop").hidden = !on;
  find("#send").hidden = on;
  find("#log").setAttribute("aria-busy", String(on)); // screen readers get the answer when it is whole
}

function follow(log, work) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  work();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

async function ask(model, split) {
  const log = find("#log");
  const question = find("#question").value.trim();
  if (!question || asking) return;
  find("#question").value = "";
  turns.push({ role: "user", content: question });
  say("you", question);
  log.scrollTop = log.scrollHeight;
  asking = new AbortController();
  busy(true);
  const answer = say("answer", "");
  const text = answer.appendChild(document.createTextNode(""));
  const timing = { first: 0, pieces: 0, usage: null };
  try {
    for await (const event of events(await post(model, asking.signal))) {
      const choice = event.choices?.[0];
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      timing.usage = event.usage ?? timing.usage;
      if (!piece) continue;
      timing.first ||= performance.now();
      timing.pieces += 1;
      follow(log, () => text.appendData(piece));
    }
  } catch (error) {
    if (error.name !== "AbortError") say("error", error.message);
  }
  finish(answer, text.data, timing, split());
}

function finish(answer, text, timing, split) {
  asking = null;
  busy(false);
  if (text) {
    turns.push({ role: "assistant", content: text });
    const tokens = timing.usage?.completion_tokens ?? timing.pieces;
    const seconds = (performance.now() - timing.first) / 1000;
    const speed = tokens > 1 && seconds > 0 ? `, ${rate((tokens - 1) / seconds)} per second` : "";
    answer.append(element("small", {}, `${tokens} tokens${speed}${split ? `, ${split}` : ""}`));
    find("#log").scrollTop = find("#log").scrollHeight;
  } else {
    answer.remove();
    turns.pop(); // the question that got no answer
  }
  find("#question").focus();
}

function startChat(model, split) {
  const form = find("#ask");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    ask(model(), split);
  });
  find("#question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  find("#stop").addEventListener("click", () => asking?.abort());
  find("#clear").addEventListener("click", () => {
    asking?.abort();
    turns.length = 0;
    find("#log").replaceChildren(element("p", { class: "empty" }, EMPTY));
    find("#question").focus();
  });
  say("empty", EMPTY);
}

const EMPTY = "What you write stays on these machines. Enter sends, Shift and Enter begin a new line.";
