"use strict";
// Two recipes side by side: each side is a conversation with one model of /v1/chat/completions, streamed.

const byId = (id) => document.getElementById(id);
const sides = ["a", "b"].map((id) => ({ box: byId(id), messages: [], usage: null }));
const MOST = Number(byId("tokens").max); // of the answer
const contexts = new Map(); // id of a model: tokens of its context
let running = null; // AbortController of the answers that are being made

const headers = () => {
  const key = byId("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
};

const notice = (text) => {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
};

const errorOf = async (reply) => {
  const found = await reply.json().catch(() => null);
  return new Error(found?.error?.message ?? `the server answered ${reply.status}`);
};

const limitTokens = () => {
  const found = sides.map((side) => contexts.get(side.box.querySelector("select").value) ?? MOST);
  byId("tokens").max = Math.min(MOST, ...found);
};

async function loadModels() {
  const reply = await fetch("v1/models", { headers: headers() });
  byId("key-field").hidden = reply.status !== 401 && !byId("key").value;
  if (reply.status === 401) return notice("This server asks for its API key.");
  if (!reply.ok) throw await errorOf(reply);
  const models = (await reply.json()).data, ids = models.map((model) => model.id);
  models.forEach((model) => contexts.set(model.id, model.max_model_len));
  sides.forEach((side, i) => {
    const select = side.box.querySelector("select");
    select.replaceChildren(...ids.map((id) => new Option(id, id)));
    select.selectedIndex = Math.min(i, ids.length - 1);
  });
  limitTokens();
  notice("");
}

const turn = (side, role, text = "") => {
  const p = document.createElement("p");
  p.className = `turn ${role}`;
  p.textContent = text;
  side.box.querySelector(".turns").append(p);
  return p;
};

// the objects of a stream of events
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// returns whether the model answered
async function answer(side, signal) {
  const body = {
    model: side.box.querySelector("select").value,
    messages: side.messages,
    max_tokens: Number(byId("tokens").value),
    temperature: Number(byId("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  const p = turn(side, "assistant waiting");
  let text = "", cut = false;
  try {
    const reply = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    if (!reply.ok) throw await errorOf(reply);
    for await (const chunk of events(reply)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) side.usage = chunk.usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      p.classList.remove("waiting");
      text += choice.delta.content ?? "";
      cut = choice.finish_reason === "length";
      p.textContent = text;
    }
    if (cut) p.insertAdjacentHTML("beforeend", ' <span class="cut">[cut here]</span>');
    side.messages.push({ role: "assistant", content: text || " " });
    cost(side);
    return true;
  } catch (error) {
    p.classList.remove("waiting");
    const what = error.name === "AbortError" ? "stopped" : error.message;
    p.insertAdjacentHTML("beforeend", `${text ? " " : ""}<span class="failed"></span>`);
    p.lastChild.textContent = `[${what}]`;
    side.usage = null;
    side.messages.pop(); // the question was not answered
    return false;
  }
}

const ms = (x) => (x == null ? "–" : x < 10 ? `${x.toFixed(1)} ms` : x < 10000 ? `${Math.round(x)} ms` : `${(x / 1000).toFixed(1)} s`);
const bytes = (x) => (x == null ? "–" : x < 1e6 ? `${(x / 1e3).toFixed(0)} kB` : `${(x / 1e6).toFixed(1)} MB`);

function cost(side) {
  const u = side.usage, m = u.llmopt, cached = u.prompt_tokens_details.cached_tokens;
  const rows = [
    ["Prompt tokens", `${u.prompt_tokens}${m.prompt_tokens_saved ? ` (${m.prompt_tokens_saved} saved)` : ""}`],
    cached && ["of which read before", cached],
    ["Time to first token", ms(m.ttft_ms)],
    ["Time per token", ms(m.tpot_ms)],
    ["Tokens of the answer", u.completion_tokens],
    ["Keys and values", bytes(m.kv_bytes_peak)],
    m.skipped_weight_bytes && ["Weights skipped per token", bytes(m.skipped_weight_bytes)],
    m.queue_ms > 1 && ["Waited for the model", ms(m.queue_ms)],
  ].filter(Boolean);
  const table = side.box.querySelector(".cost");
  table.replaceChildren(...rows.map(([name, value]) => {
    const tr = document.createElement("tr"), th = document.createElement("th"), td = document.createElement("td");
    th.scope = "row";
    th.textContent = name;
    td.textContent = value;
    tr.append(th, td);
    return tr;
  }));
  table.hidden = false;
}

function compare() {
  const [a, b] = sides.map((side) => side.usage);
  byId("both").hidden = !(a && b);
  if (!a || !b) return;
  const pairs = [
    ["prompt tokens", a.prompt_tokens, b.prompt_tokens, true],
    ["time to first token", a.llmopt.ttft_ms, b.llmopt.ttft_ms],
    ["time per token", a.llmopt.tpot_ms, b.llmopt.tpot_ms],
    ["keys and values", a.llmopt.kv_bytes_peak, b.llmopt.kv_bytes_peak, true],
  ].filter(([, x, y]) => x && y != null);
  byId("both").querySelector("ul").replaceChildren(...pairs.map(([name, x, y, exact]) => {
    const li = document.createElement("li"), value = document.createElement("b"), ratio = y / x;
    value.textContent = `${ratio.toFixed(2)} ×`;
    value.className = !exact ? "" : ratio < 1 ? "less" : ratio > 1 ? "more" : ""; // one time is no verdict
    li.append(value, ` ${name}`);
    return li;
  }));
}

const busy = (on) => {
  byId("go").disabled = byId("new").disabled = on;
  byId("stop").hidden = !on;
};

const hideCosts = () => {
  for (const side of sides) side.box.querySelector(".cost").hidden = true;
  byId("both").hidden = true;
};

async function ask(event) {
  event.preventDefault();
  const prompt = byId("prompt").value.trim();
  if (!prompt || running) return;
  running = new AbortController();
  busy(true);
  for (const side of sides) {
    side.usage = null;
    side.messages.push({ role: "user", content: prompt });
    turn(side, "user", prompt);
  }
  hideCosts(); // they are of the answer before
  byId("prompt").value = "";
  const answered = await Promise.all(sides.map((side) => answer(side, running.signal)));
  if (!answered.includes(true)) byId("prompt").value ||= prompt; // to be asked again
  running = null;
  busy(false);
  compare();
}

function reset() {
  for (const side of sides) {
    Object.assign(side, { messages: [], usage: null });
    side.box.querySelector(".turns").replaceChildren();
  }
  hideCosts();
}

byId("ask").addEventListener("submit", ask);
byId("new").addEventListener("click", reset);
sides.forEach((side) => side.box.querySelector("select").addEventListener("change", limitTokens));
byId("stop").addEventListener("click", () => running?.abort());
byId("key").addEventListener("change", () => loadModels().catch((error) => notice(error.message)));
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
loadModels().catch((error) => notice(error.message));
