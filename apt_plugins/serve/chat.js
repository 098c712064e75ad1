"use strict";

const at = (id) => document.getElementById(id);
const said = []; // {role, content}: the conversation, which is kept nowhere else
let model = null;
let answering = null; // what aborts the answer that is being given

function headers() {
  const key = at("key").value;
  const found = { "Content-Type": "application/json" };
  if (key) found.Authorization = `Bearer ${key}`;
  return found;
}

function tell(text) {
  at("status").textContent = text;
}

async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers ${response.status}`;
  }
}

async function meet() {
  let response;
  try {
    response = await fetch("v1/models", { headers: headers() });
  } catch {
    tell("The server cannot be reached.");
    return;
  }
  if (response.status === 401) {
    at("key-field").hidden = false;
    at("settings").open = true;
    at("about").textContent = "needs an API key";
    if (at("key").value) tell(await problemOf(response));
    else at("key").focus();
    return;
  }
  if (!response.ok) {
    tell(await problemOf(response));
    return;
  }
  model = (await response.json()).data[0];
  tell("");
  document.title = `Chat: ${model.id}`;
  at("model").textContent = model.id;
  at("about").textContent =
    `step ${model.step.toLocaleString("en")}, a context of ` +
    `${model.max_seq_len.toLocaleString("en")} tokens`;
  at("max_tokens").max = model.max_tokens;
  if (Number(at("max_tokens").value) > model.max_tokens) at("max_tokens").value = model.max_tokens;
  at("notice").textContent = model.notice;
  at("notice").hidden = !model.notice;
}

// A model's text is shown as text: it never becomes part of the page's markup.
function show(role, text) {
  const box = document.createElement("div");
  box.className = `message ${role}`;
  box.setAttribute("aria-label", role === "user" ? "You" : "Model");
  const paragraph = document.createElement("p");
  paragraph.textContent = text;
  box.append(paragraph);
  at("messages").append(box);
  follow(true);
  return box;
}

function remark(box, text) {
  const line = document.createElement("p");
  line.className = "remark";
  line.textContent = text;
  box.append(line);
}

function follow(always) {
  const list = at("messages");
  const near = list.scrollHeight - list.scrollTop - list.clientHeight < 120;
  if (always || near) list.scrollTop = list.scrollHeight;
}

function request() {
  const messages = at("system").value
    ? [{ role: "system", content: at("system").value }, ...said]
    : [...said];
  const body = { model: model.id, messages, stream: true };
  for (const name of ["temperature", "top_k", "top_p", "max_tokens", "seed"]) {
    const field = at(name);
    if (!field.checkValidity()) throw new Error(`${name}: ${field.validationMessage}`);
    if (field.value !== "") body[name] = Number(field.value);
  }
  return body;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer() {
  const body = request();
  answering = new AbortController();
  busy(true);
  const box = show("assistant", "");
  box.classList.add("open");
  const paragraph = box.firstChild;
  let text = "";
  let reason = "";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(body),
      signal: answering.signal,
    });
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      text += choice.delta.content ?? "";
      paragraph.textContent = text;
      if (choice.finish_reason) reason = choice.finish_reason;
      if (choice.dropped_tokens) {
        remark(box, "The beginning of the message does not fit into the context.");
      }
      for (const source of choice.sources ?? []) {
        remark(box, `Source: ${source.path}:${source.first_line}`);
      }
      follow(false);
    }
    if (!reason) throw new Error("the connection ended before the answer did");
    if (reason === "length") remark(box, "Cut at the most tokens.");
    if (!text) remark(box, "An empty answer.");
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (stopped) remark(box, "Stopped.");
    else tell(`The answer failed: ${error.message}`);
    if (!text) {
      box.remove();
      takeBack();
      return;
    }
  } finally {
    box.classList.remove("open");
    answering = null;
    busy(false);
    follow(false);
  }
  said.push({ role: "assistant", content: text });
}

// The last message of the user goes back to where it is written.
function takeBack() {
  const last = said.pop();
  at("messages").lastElementChild.remove();
  if (!at("text").value) at("text").value = last.content;
  grow();
}

function busy(yes) {
  at("send").hidden = yes;
  at("stop").hidden = !yes;
  at("clear").disabled = yes;
  at("messages").setAttribute("aria-busy", String(yes));
  if (!yes) at("text").focus();
}

async function send() {
  const text = at("text").value;
  if (!text.trim() || answering) return;
  tell("");
  if (!model) await meet();
  if (!model) return;
  said.push({ role: "user", content: text });
  show("user", text);
  at("text").value = "";
  grow();
  try {
    await answer();
  } catch (error) {
    tell(error.message);
    takeBack();
  }
}

function grow() {
  const field = at("text");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
at("text").addEventListener("input", grow);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") answering?.abort();
});
at("stop").addEventListener("click", () => answering?.abort());
at("clear").addEventListener("click", () => {
  said.length = 0;
  at("messages").replaceChildren();
  tell("");
  at("text").focus();
});
at("key").addEventListener("change", meet);
meet();
