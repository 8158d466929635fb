// Attention at a glance: a badge on Select Attention with what its last sampling resolved to, and a dialog with every backend on this machine.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addBadge, forget, setWanted, show, stateOf } from "./badge.js";
import { button, copy, everyNode, make, nodeAt, openPanel } from "./page.js";
import { said, summed, t } from "./texts.js";

const SELECTOR = "Flux2SelectAttention";
const WIDTH = 380; // pixels of a new one: its badge is read whole
const UI_KEY = "flux2_attention_status"; // in the selector's output, and the name of the server's message
const ROUTE = "/flux2_attention";
const COMMAND = "Flux2Attention.ShowBackends";
const BADGE_SETTING = "Flux2Attention.Badge";
const DIALOG_SETTING = "Flux2Attention.Backends";

// --- the badge on the node: tokens name the dispatchers of its last run, several where the node ran for a list of models

function* selectors() {
  for (const node of everyNode()) if (node.comfyClass === SELECTOR) yield node;
}

function tell(node, status) {
  show(node, { from: "run", open: () => openDialog(node), ...status });
}

async function ask(node, token) {
  const answer = await api.fetchApi(`${ROUTE}/status/${encodeURIComponent(token)}`);
  const status = answer.ok ? await answer.json() : { state: null, text: "", report: "" };
  const known = stateOf(node);
  if (known?.token === token && known.heard !== token) tell(node, status); // a message that came meanwhile is newer
}

function follow(node, output) {
  const tokens = output?.[UI_KEY] ?? [];
  if (!tokens.length) return;
  const known = stateOf(node), token = tokens.at(-1);
  if (tokens.includes(known?.token) && known.text) return; // its messages have told more than an answer would
  show(node, { tokens, token });
  ask(node, token);
}

// --- the dialog

const HEADINGS = { "runs here": "run here", "to install": "would run once installed", "other hardware": "need other hardware" };

function commandLine(command) {
  return make("div", {}, make("code", { textContent: command }), button(t("copy"), (made) => copy(command, made)));
}

function verdict(reasons) {
  if (!reasons) return null;
  return make("div", { className: reasons.length ? "failed" : "passed", textContent: said(reasons.join(" ")) || t("test call passed") });
}

function rowOf(entry, tested, node, close) {
  const hint = entry.command ? commandLine(entry.command) : entry.install ? make("div", { textContent: said(entry.install) }) : null;
  const where = entry.hardware === "any" ? t("any device") : (entry.cards ?? entry.hardware);
  const about = `${summed(entry.summary)}; ${t(entry.exact ? "exact" : "approximate")}; ${where}`;
  const take = node && entry.state === "runs here" ? button(t("use this one"), () => (choose(node, entry.backend), close())) : null;
  return make("tr", {}, make("td", {}, make("code", { textContent: entry.backend }), take),
    make("td", {}, make("div", { textContent: said(entry.reasons.join(" ")) || entry.version }), verdict(tested?.[entry.backend]), hint, make("small", { textContent: about, title: entry.hardware })));
}

function choose(node, backend) { // as a click in the list does
  const widget = node.widgets.find(({ name }) => name === "backend"), before = widget.value;
  widget.value = backend;
  widget.callback?.(backend, app.canvas, node);
  node.onWidgetChanged?.("backend", backend, before, widget);
}

// Backends whose reason is the same sentence, such as another make of GPU, are one row.
function grouped(rows) {
  const groups = new Map();
  for (const entry of rows) {
    const key = entry.state === "other hardware" ? entry.reasons.join(" ") : entry.backend;
    groups.set(key, [...(groups.get(key) ?? []), entry]);
  }
  return [...groups.values()];
}

function groupRow(entries) {
  const names = entries.map((entry) => make("code", { textContent: entry.backend })).flatMap((code) => [code, " "]);
  return make("tr", {}, make("td", { colSpan: 2 }, make("div", { textContent: said(entries[0].reasons.join(" ")) }), names));
}

function tables({ backends, tested }, node, close) {
  return Object.entries(HEADINGS).map(([state, heading]) => {
    const rows = backends.filter((entry) => entry.state === state);
    if (!rows.length) return null;
    const made = grouped(rows).map((entries) => (entries.length > 1 ? groupRow(entries) : rowOf(entries[0], tested, node, close)));
    return make("table", {}, make("caption", { textContent: `${t(heading)} (${rows.length})` }), make("tbody", {}, made));
  });
}

function machineOf(machine) {
  return make("dl", {}, Object.entries(machine).flatMap(([name, value]) => [make("dt", { textContent: said(name) }), make("dd", { textContent: value })]));
}

async function fetchBackends(path, options) {
  const answer = await api.fetchApi(ROUTE + path, options);
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error ?? `The server answered ${answer.status}.`);
  return found;
}

async function reportOf(node) {
  const { token, report } = stateOf(node) ?? {};
  if (!token) return report;
  const answer = await api.fetchApi(`${ROUTE}/status/${encodeURIComponent(token)}`);
  return answer.ok ? (await answer.json()).report : "";
}

export function openDialog(node) {
  let text = "";
  const test = button(t("test"), async () => {
    note.textContent = t("testing");
    test.disabled = true;
    await fill("/backends/test", { method: "POST" });
    test.disabled = false;
  }, { title: t("test hint") });
  const all = button(t("copy"), (made) => copy(text, made), { title: t("copy hint") });
  const { dialog, main, note } = openPanel(t("backends on this machine"), [test, all, button(t("close"), () => dialog.close())]);
  const fill = async (path, options) => {
    try {
      const [found, report] = await Promise.all([fetchBackends(path, options), node ? reportOf(node) : null]);
      text = [report, found.text].filter(Boolean).join("\n\n");
      const parts = [report ? make("pre", { textContent: said(report) }) : null, machineOf(found.machine), ...tables(found, node, () => dialog.close())];
      main.replaceChildren(...parts.filter(Boolean));
      note.textContent = "";
    } catch (error) {
      note.textContent = error.message;
    }
  };
  main.textContent = t("looking");
  fill("/backends");
}

app.registerExtension({
  name: "flux2_attention.status",
  commands: [{ id: COMMAND, label: "Flux 2 Attention: backends on this machine", menubarLabel: "Backends on this machine", icon: "pi pi-microchip", function: () => openDialog() }],
  menuCommands: [{ path: ["Extensions", "Flux 2 Attention"], commands: [COMMAND] }],
  settings: [
    {
      id: DIALOG_SETTING, category: ["Flux 2 Attention", "Attention", "Backends"], name: "Attention backends on this machine", defaultValue: null,
      tooltip: "Every backend: whether it runs here, why not, and how to install it.",
      type: () => button(t("show"), () => openDialog(), { className: "p-button p-component", style: "padding: 5px 14px; border-radius: 6px" }),
    },
    {
      id: BADGE_SETTING, category: ["Flux 2 Attention", "Attention", "Badge"], name: "Show on Select Attention which kernel ran", type: "boolean", defaultValue: true,
      tooltip: "A badge on the node, written when a sampling has ended. Click it for the whole report.",
      onChange: (value) => setWanted(value, everyNode),
    },
  ],
  setup() {
    api.addEventListener(UI_KEY, ({ detail }) => {
      for (const node of selectors()) if (stateOf(node)?.tokens?.includes(detail.token)) tell(node, { ...detail, heard: detail.token });
    });
  },
  nodeCreated(node) {
    if (node.subgraph) addBadge(node);
    if (node.comfyClass !== SELECTOR) return;
    node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
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
    return node.comfyClass === SELECTOR ? [null, { content: t("backends on this machine"), callback: () => openDialog(node) }] : [];
  },
  onNodeOutputsUpdated(outputs) { // a run opened from the queue's history, or another tab's graph
    for (const [locator, output] of Object.entries(outputs)) {
      const node = output?.[UI_KEY] && nodeAt(locator);
      if (node?.comfyClass === SELECTOR) follow(node, output);
    }
  },
});
