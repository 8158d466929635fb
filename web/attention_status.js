// Attention at a glance: a badge on Select Attention with what its last sampling resolved to, and a dialog with every backend on this machine.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const SELECTOR = "Flux2SelectAttention";
const UI_KEY = "flux2_attention_status"; // in the selector's output, and the name of the server's message
const ROUTE = "/flux2_attention";
const COMMAND = "Flux2Attention.ShowBackends";
const BADGE_SETTING = "Flux2Attention.Badge";
const DIALOG_SETTING = "Flux2Attention.Backends";
const TITLE = "Flux 2 Attention: backends on this machine";
const LONGEST = 39; // letters on a badge; a longer text is cut there and whole in the dialog
const COLOURS = {
  ran: ["#e6f4ea", "#1e5631"], running: ["#e8eaed", "#3c4654"], other: ["#3b2a00", "#f0b429"],
  nothing: ["#3b2a00", "#f0b429"], cancelled: ["#e8eaed", "#3c4654"], failed: ["#ffffff", "#a12622"],
};

// --- the badge on the node

const states = new WeakMap(); // node -> {tokens, token, state, text, report, badge}; several tokens where the node ran for a list of models
let wanted = true; // the setting

function cut(text) {
  return text.length > LONGEST ? `${text.slice(0, LONGEST - 1)}…` : text;
}

// Nodes that are page elements draw their badges again when something reactive changes that a badge function has read. The extension manager is a
// reactive object of the page, so a counter kept on it is reactive too; where it is not, these nodes show the badge when they are drawn anew.
function changes() {
  app.extensionManager.flux2Attention ??= { count: 0 };
  return app.extensionManager.flux2Attention; // read back: what was assigned is the plain object
}

function addBadge(node) {
  const none = new window.LGraphBadge({ text: "" });
  node.badges.push(() => (changes().count, states.get(node)?.badge ?? none));
}

function show(node, status) {
  const now = { ...states.get(node), ...status };
  now.badge = wanted ? badgeOf(node, now) : null;
  states.set(node, now);
  changes().count += 1;
  node.setDirtyCanvas(true, true);
}

function badgeOf(node, { state, text }) {
  const [fgColor, bgColor] = COLOURS[state] ?? [];
  return fgColor && text ? new window.LGraphBadge({ text: cut(text), fgColor, bgColor, onClick: () => openDialog(node) }) : null;
}

function forget(node) {
  if (states.has(node)) show(node, { tokens: [], token: null, state: null, text: "", report: "" });
}

async function ask(node, token) {
  const answer = await api.fetchApi(`${ROUTE}/status/${encodeURIComponent(token)}`);
  const status = answer.ok ? await answer.json() : { state: null, text: "", report: "" };
  if (states.get(node)?.token === token) show(node, status);
}

function follow(node, output) {
  const tokens = output?.[UI_KEY] ?? [];
  if (!tokens.length) return;
  const known = states.get(node), token = tokens.at(-1);
  if (tokens.includes(known?.token) && known.text) return; // its messages have told more than an answer would
  states.set(node, { ...known, tokens, token });
  ask(node, token);
}

function setWanted(value) {
  const changed = wanted !== value;
  wanted = value;
  if (!changed || !app.canvas) return; // told once at the start too, before there is a graph
  for (const node of selectors()) if (states.has(node)) show(node, {});
}

function* selectors(graph = app.rootGraph ?? app.graph, seen = new Set()) {
  if (!graph || seen.has(graph)) return;
  seen.add(graph);
  for (const node of graph.nodes) {
    if (node.comfyClass === SELECTOR) yield node;
    if (node.subgraph) yield* selectors(node.subgraph, seen);
  }
}

function nodeAt(locator) { // "12", or "<id of a subgraph>:12"
  const [id, subgraph] = String(locator).split(":").reverse();
  const root = app.rootGraph ?? app.graph;
  const graph = subgraph === undefined ? root : root.subgraphs?.get(subgraph);
  return graph?.getNodeById(id) ?? graph?.getNodeById(Number(id));
}

function nodeOfExecution(id) { // "12", or "3:12" for node 12 inside node 3
  let node = null;
  for (const step of String(id).split(":")) {
    const graph = node ? node.subgraph : (app.rootGraph ?? app.graph);
    node = graph?.getNodeById(step) ?? graph?.getNodeById(Number(step));
  }
  return node;
}

function refused({ node_id, node_type, exception_message }) {
  const node = node_type === SELECTOR && nodeOfExecution(node_id);
  if (!node) return;
  const message = (exception_message ?? "").trim();
  const reason = message.split("\n").find((line) => line.startsWith("- "))?.slice(2) ?? message.split("\n")[0];
  const backend = node.widgets?.find(({ name }) => name === "backend")?.value;
  show(node, { tokens: [], token: null, state: "failed", text: `${backend} refused: ${reason}`, report: message });
}

// --- the dialog

const STYLE = `
  .flux2-backends { width: min(1100px, 94vw); max-height: 88vh; padding: 0; border: 1px solid var(--border-color, #555); border-radius: 10px;
    background: var(--comfy-menu-bg, #222); color: var(--input-text, #ddd); font: 14px/1.45 sans-serif; }
  .flux2-backends[open] { display: flex; flex-direction: column; }
  .flux2-backends::backdrop { background: rgba(0, 0, 0, 0.55); }
  .flux2-backends header, .flux2-backends footer { display: flex; gap: 10px; align-items: center; padding: 12px 18px; }
  .flux2-backends h2 { flex: 1; margin: 0; font-size: 17px; }
  .flux2-backends main { overflow: auto; padding: 0 18px; flex: 1; }
  .flux2-backends footer { justify-content: flex-end; border-top: 1px solid var(--border-color, #555); }
  .flux2-backends footer p { flex: 1; margin: 0; }
  .flux2-backends dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0 0 10px; }
  .flux2-backends dt { color: var(--descrip-text, #999); } .flux2-backends dd { margin: 0; }
  .flux2-backends pre { margin: 0 0 12px; padding: 10px; white-space: pre-wrap; background: var(--comfy-input-bg, #333); border-radius: 6px; font-size: 12px; }
  .flux2-backends table { width: 100%; border-collapse: collapse; margin-bottom: 14px; }
  .flux2-backends caption { text-align: left; font-weight: 600; padding: 10px 0 4px; }
  .flux2-backends td { border-top: 1px solid var(--border-color, #555); padding: 5px 12px 5px 0; vertical-align: top; }
  .flux2-backends td:first-child { white-space: nowrap; font-family: monospace; width: 11em; }
  .flux2-backends code { background: var(--comfy-input-bg, #333); border-radius: 4px; padding: 1px 5px; overflow-wrap: anywhere; user-select: all; }
  .flux2-backends small { color: var(--descrip-text, #999); display: block; }
  .flux2-backends button { background: var(--comfy-input-bg, #333); color: inherit; border: 1px solid var(--border-color, #555); border-radius: 6px;
    padding: 5px 12px; cursor: pointer; font: inherit; }
  .flux2-backends td button { padding: 0 7px; font-size: 12px; margin-left: 6px; }
  .flux2-backends .passed { color: #58b368; } .flux2-backends .failed { color: #e5645f; }`;
const HEADINGS = { "runs here": "Run here", "to install": "Would run here once installed", "other hardware": "Need other hardware" };

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

async function copy(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a page that was not opened by https or from this machine has no clipboard of that kind
    const area = make("textarea", { value: text });
    button.closest("dialog").append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "copied";
  setTimeout(() => (button.textContent = label), 1500);
}

function commandLine(command) {
  const button = make("button", { type: "button", textContent: "copy" });
  button.onclick = () => copy(command, button);
  return make("div", {}, make("code", { textContent: command }), button);
}

function verdict(reasons) {
  if (!reasons) return null;
  return make("div", { className: reasons.length ? "failed" : "passed", textContent: reasons.join(" ") || "test call passed" });
}

function rowOf(entry, tested) {
  const hint = entry.command ? commandLine(entry.command) : entry.install ? make("div", { textContent: entry.install }) : null;
  const about = `${entry.summary}; ${entry.exact ? "exact" : "quantised"}; ${entry.hardware}`;
  return make("tr", {}, make("td", { textContent: entry.backend }),
    make("td", {}, make("div", { textContent: entry.reasons.join(" ") || entry.version }), verdict(tested?.[entry.backend]), hint, make("small", { textContent: about })));
}

function tables({ backends, tested }) {
  return Object.entries(HEADINGS).map(([state, heading]) => {
    const rows = backends.filter((entry) => entry.state === state);
    return rows.length ? make("table", {}, make("caption", { textContent: `${heading} (${rows.length})` }), make("tbody", {}, ...rows.map((entry) => rowOf(entry, tested)))) : null;
  });
}

function machineOf(machine) {
  return make("dl", {}, ...Object.entries(machine).flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
}

async function fetchBackends(path, options) {
  const answer = await api.fetchApi(ROUTE + path, options);
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error ?? `The server answered ${answer.status}.`);
  return found;
}

async function reportOf(node) {
  const { token, report } = states.get(node) ?? {};
  if (!token) return report;
  const answer = await api.fetchApi(`${ROUTE}/status/${encodeURIComponent(token)}`);
  return answer.ok ? (await answer.json()).report : "";
}

function openDialog(node) {
  document.querySelector(".flux2-backends")?.close();
  const main = make("main", {}, "Looking at the libraries that are installed …");
  const note = make("p");
  const [test, all, close] = ["Test", "Copy", "Close"].map((textContent) => make("button", { type: "button", textContent }));
  const dialog = make("dialog", { className: "flux2-backends" }, make("style", { textContent: STYLE }),
    make("header", {}, make("h2", { textContent: TITLE })), main, make("footer", {}, note, test, all, close));
  let text = "";
  const fill = async (path, options) => {
    try {
      const [found, report] = await Promise.all([fetchBackends(path, options), node ? reportOf(node) : null]);
      text = [report, found.text].filter(Boolean).join("\n\n");
      main.replaceChildren(...[report ? make("pre", { textContent: report }) : null, machineOf(found.machine), ...tables(found)].filter(Boolean));
      note.textContent = "";
    } catch (error) {
      note.textContent = error.message;
    }
  };
  test.title = "One small call of every backend that runs here, compared with float32";
  test.onclick = async () => {
    note.textContent = "Testing … a library that compiles its kernel first can take minutes.";
    test.disabled = true;
    await fill("/backends/test", { method: "POST" });
    test.disabled = false;
  };
  all.title = "Copy everything as text, for a bug report";
  all.onclick = () => copy(text, all);
  close.onclick = () => dialog.close();
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("keydown", (event) => event.stopPropagation()); // the graph has shortcuts of its own
  document.body.append(dialog);
  dialog.showModal();
  fill("/backends");
}

app.registerExtension({
  name: "flux2_attention.status",
  commands: [{ id: COMMAND, label: TITLE, menubarLabel: "Backends on this machine", icon: "pi pi-microchip", function: () => openDialog() }],
  menuCommands: [{ path: ["Extensions", "Flux 2 Attention"], commands: [COMMAND] }],
  settings: [
    {
      id: DIALOG_SETTING, category: ["Flux 2 Attention", "Attention", "Backends"], name: "Attention backends on this machine", defaultValue: null,
      tooltip: "Every backend: whether it runs here, why not, and how to install it.",
      type: () => make("button", { type: "button", textContent: "Show", className: "p-button p-component", style: "padding: 5px 14px; border-radius: 6px", onclick: () => openDialog() }),
    },
    {
      id: BADGE_SETTING, category: ["Flux 2 Attention", "Attention", "Badge"], name: "Show on Select Attention which kernel ran", type: "boolean", defaultValue: true,
      tooltip: "A badge on the node, written when a sampling has ended. Click it for the whole report.",
      onChange: setWanted,
    },
  ],
  setup() {
    api.addEventListener(UI_KEY, ({ detail }) => {
      for (const node of selectors()) if (states.get(node)?.tokens?.includes(detail.token)) show(node, detail);
    });
    api.addEventListener("execution_error", ({ detail }) => refused(detail));
  },
  nodeCreated(node) {
    if (node.comfyClass !== SELECTOR) return;
    addBadge(node);
    const { onExecuted, onWidgetChanged } = node;
    node.onExecuted = function (output) {
      onExecuted?.call(this, output);
      follow(this, output);
    };
    node.onWidgetChanged = function (...change) { // another choice: the badge would speak of the one before
      forget(this);
      return onWidgetChanged?.apply(this, change);
    };
  },
  getNodeMenuItems(node) {
    return node.comfyClass === SELECTOR ? [null, { content: TITLE, callback: () => openDialog(node) }] : [];
  },
  onNodeOutputsUpdated(outputs) { // a run opened from the queue's history, or another tab's graph
    for (const [locator, output] of Object.entries(outputs)) {
      const node = output?.[UI_KEY] && nodeAt(locator);
      if (node?.comfyClass === SELECTOR) follow(node, output);
    }
  },
});
