// Choosing: what the values of combos are called, which backends this machine can run, whether the choice fits, and the inputs that do not apply.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { forget, show, stateOf } from "./badge.js";
import { everyNode, isOurs } from "./page.js";
import { openReason } from "./reasons.js";
import { t } from "./texts.js";

const SELECTOR = "Flux2SelectAttention", COMPARE = "Flux2CompareAttention";
const BACKENDS = { [SELECTOR]: ["backend", "edge_backend"], [COMPARE]: ["reference", "candidate_1", "candidate_2", "candidate_3", "candidate_4", "edge_backend"] };
const COUNTS = ["first_steps", "last_steps", "first_blocks", "last_blocks"];
// input -> {value: key of its label}: values are stored in workflows and stay, labels may change
const MEMORY = { "keep on GPU": "stay in VRAM", "CPU when idle": "leave VRAM when idle", "layer by layer": "layer by layer" };
const LABELS = {
  Flux2LoadModel: { weight_dtype: { "as stored": "as in the file" }, memory: MEMORY },
  Flux2LoadTextEncoder: { memory: MEMORY, padding: { zeros: "ComfyUI", reference: "diffusers" }, load: { now: "at once", "when needed": "when a new prompt comes" } },
  Flux2LoadVAE: { memory: MEMORY },
  Flux2FastBlocks: { precision: { checkpoint: "as in the file" } },
  Flux2EncodePrompts: { file: { "": "no file" } },
  Flux2CompileBlocks: { failures: { error: "stop with the reason", "run eager and report": "run uncompiled" } },
  [SELECTOR]: { unsupported_calls: { error: "stop with the reason", "use SDPA and report": "let PyTorch compute that part" } },
};

// --- the backends of this machine, asked when the first node that offers them is there: the answer imports libraries

let backends = null, asked = null;

export function knowBackends() {
  asked ??= api.fetchApi("/flux2_attention/backends").then(async (answer) => {
    if (!answer.ok) throw new Error(`The server answered ${answer.status}.`);
    const found = await answer.json(), rows = new Map(found.backends.map((entry) => [entry.backend, entry]));
    const choices = found.choices ?? found.backends; // with auto and comfyui, in the order in which to offer them
    backends = new Map(choices.map((choice) => [choice.backend, { ...rows.get(choice.backend), ...choice }]));
  }).catch((error) => {
    console.warn("Flux 2 Attention: the list of backends could not be read.", error);
    asked = null; // the next node asks again
  });
  return asked;
}

const runsHere = (entry) => !entry || (entry.group ?? "here") === "here";

// "flash4 · not installed", "aiter · needs AMD · experimental", "sage2 · approximate"
export function labelOf(value) {
  const marks = backends?.get(value)?.marks ?? [];
  return [value, ...marks.map((mark) => (mark.startsWith("needs ") ? t("needs $1", mark.slice(6)) : t(mark)))].join(" · ");
}

// In the order of the server, which begins with those that run here; what it does not name, such as "none", stays in front.
function sorted(values) {
  const order = [...backends.keys()];
  return [...values].sort((a, b) => order.indexOf(a) - order.indexOf(b));
}

function offer(node) {
  for (const name of BACKENDS[node.comfyClass] ?? []) {
    const widget = node.widgets?.find((one) => one.name === name);
    const values = widget?.options?.values;
    if (Array.isArray(values)) values.splice(0, values.length, ...sorted(values)); // in place: nodes that are page elements hold on to the array
  }
  judge(node);
  node.setDirtyCanvas(true, true);
}

// --- is the choice one that can run?

// An input that a subgraph's own input feeds has its value on the node of that subgraph: {host, widget}, or null.
function promoted(node, name) {
  const slot = node.inputs?.find((one) => one.name === name), link = slot?.link != null && node.graph?.getLink?.(slot.link);
  if (!link || link.origin_id !== node.graph.inputNode?.id) return null;
  const input = node.graph.inputs[link.origin_slot], host = [...everyNode()].find(({ subgraph }) => subgraph === node.graph);
  const widget = host?.widgets?.find((one) => one.name === input?.name);
  return widget && { host, widget };
}

const valueOf = (node, name) => (promoted(node, name)?.widget ?? node.widgets?.find((one) => one.name === name))?.value;
const linked = (node, name) => node.inputs?.some((slot) => slot.name === name && slot.link != null) && !promoted(node, name);

// What is wrong with the choices of a node, as a sentence, or null.
function wrong(node) {
  for (const name of ["backend", "edge_backend"]) {
    const entry = backends?.get(valueOf(node, name));
    if (!linked(node, name) && !runsHere(entry)) return { entry, text: t("$1 cannot run here", entry.backend) };
  }
  const counts = COUNTS.filter((name) => valueOf(node, name) > 0 || linked(node, name));
  const second = linked(node, "edge_backend") || valueOf(node, "edge_backend") !== "none";
  if (second && !counts.length) return { text: t("second kernel without counts") };
  if (!second && counts.length) return { text: t("counts without second kernel") };
  return null;
}

function judge(node) {
  if (node.comfyClass !== SELECTOR) return;
  const found = wrong(node), entry = backends?.get(valueOf(node, "backend"));
  if (found) {
    const reasons = found.entry ? found.entry.reasons.join(" ") : "";
    const report = [`${found.text}${reasons ? ":" : ""}`, ...(found.entry?.reasons ?? []).map((one) => `- ${one}`), found.entry?.command || found.entry?.install || ""];
    show(node, { from: "choice", state: "failed", text: [found.text, reasons].filter(Boolean).join(": "), report: report.filter(Boolean).join("\n"),
      open: () => openReason(node.title, report.filter(Boolean).join("\n")) });
  } else if (entry?.library && stateOf(node)?.changed) {
    const text = entry.marks?.includes("approximate") ? t("runs here, approximate") : t("runs here");
    show(node, { from: "choice", state: "fits", text: `${entry.backend}: ${text}`, open: () => openReason(node.title, [entry.summary, entry.version].filter(Boolean).join("\n")) });
  } else {
    forget(node, "choice");
  }
}

// --- inputs that do not apply are not shown

function applies(node, name) {
  const slugs = [valueOf(node, "backend"), valueOf(node, "edge_backend")];
  if (name === "aiter_rounding") return slugs.some((slug) => slug?.startsWith("aiter")) || linked(node, "backend");
  return valueOf(node, "edge_backend") !== "none" || linked(node, "edge_backend") || valueOf(node, name) > 0;
}

function fold(node) {
  let changed = false;
  for (const widget of node.widgets ?? []) {
    if (widget.name !== "aiter_rounding" && !COUNTS.includes(widget.name)) continue;
    const hidden = !applies(node, widget.name) && !linked(node, widget.name);
    changed ||= Boolean(widget.hidden) !== hidden;
    widget.hidden = hidden;
    Object.assign(widget.options, { hidden });
  }
  if (changed && node.comfyClass === SELECTOR) node.setSize([node.size[0], node.computeSize()[1]]);
}

// --- defaults of new nodes, from the settings

const DEFAULTS = [
  { id: "Flux2Attention.Default.Kernel", nodes: [SELECTOR], input: "backend", value: "auto" },
  { id: "Flux2Attention.Default.ModelMemory", nodes: ["Flux2LoadModel"], input: "memory", value: "auto" },
  { id: "Flux2Attention.Default.EncoderLoad", nodes: ["Flux2LoadTextEncoder"], input: "load", value: "now" },
];
const definitions = Object.assign({}, ...await Promise.all(DEFAULTS.map(({ nodes: [node] }) => api.fetchApi(`/object_info/${node}`)
  .then((answer) => answer.json()).catch(() => ({})))));

function optionsOf({ nodes: [node], input }) {
  const { required = {}, optional = {} } = definitions[node]?.input ?? {};
  return ({ ...required, ...optional })[input]?.[1]?.options ?? [];
}

function setting(entry, place) {
  const names = ["attention kernel of new nodes", "VRAM use of new model loaders", "when new text encoders read their file"];
  const labels = LABELS[entry.nodes[0]]?.[entry.input] ?? {};
  const options = optionsOf(entry).map((value) => ({ value, text: labels[value] ? t(labels[value]) : value }));
  return { id: entry.id, category: ["Flux 2 Attention", "Defaults", entry.id.split(".").at(-1)], name: names[place], type: "combo", options, defaultValue: entry.value };
}

function prefill(node) { // a graph that is loaded sets its own values afterwards
  for (const { id, nodes, input, value } of DEFAULTS) {
    const wanted = app.extensionManager.setting.get(id), widget = nodes.includes(node.comfyClass) && node.widgets?.find(({ name }) => name === input);
    if (widget && wanted && wanted !== value && widget.options?.values?.includes(wanted)) widget.value = wanted;
  }
}

function changed(node) {
  show(node, { changed: true });
  fold(node);
  judge(node);
}

// The node of a subgraph on which a choice of a node inside is made.
function watchHost(host) {
  const { onWidgetChanged } = host;
  host.onWidgetChanged = function (...change) {
    const answer = onWidgetChanged?.apply(this, change);
    for (const node of everyNode(this.subgraph)) if (BACKENDS[node.comfyClass]) changed(node);
    return answer;
  };
}

app.registerExtension({
  name: "flux2_attention.choices",
  settings: DEFAULTS.map(setting),
  nodeCreated(node) {
    if (node.subgraph) return watchHost(node);
    if (!isOurs(node)) return;
    const labels = LABELS[node.comfyClass] ?? {}, slugs = BACKENDS[node.comfyClass] ?? [];
    for (const widget of node.widgets ?? []) {
      const known = labels[widget.name];
      if (known) Object.assign(widget.options, { getOptionLabel: (value) => (known[value] ? t(known[value]) : String(value ?? "")) });
      if (slugs.includes(widget.name)) Object.assign(widget.options, { getOptionLabel: (value) => labelOf(String(value ?? "")) });
    }
    prefill(node);
    if (!slugs.length) return;
    const { onWidgetChanged, onConfigure, onConnectionsChange } = node;
    node.onWidgetChanged = function (...change) {
      const answer = onWidgetChanged?.apply(this, change);
      changed(this);
      return answer;
    };
    node.onConfigure = function (...args) {
      const answer = onConfigure?.apply(this, args);
      fold(this);
      knowBackends().then(() => offer(this));
      return answer;
    };
    node.onConnectionsChange = function (...args) {
      const answer = onConnectionsChange?.apply(this, args);
      fold(this);
      judge(this);
      return answer;
    };
    fold(node);
    knowBackends().then(() => offer(node));
  },
});
