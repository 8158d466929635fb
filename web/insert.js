// Into the graph one has: Select Attention behind any node that gives a MODEL, by its menu or by dropping a MODEL link, and the whole open graph by a command.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { button, everyNode, make, openPanel } from "./page.js";
import { t } from "./texts.js";

const SELECTOR = "Flux2SelectAttention";
const COMMAND = "Flux2Attention.Convert";
const PROMOTED = "attention kernel"; // what the input is called on the node of a subgraph
const GAP = 40; // pixels between a node and the one put behind it

const modelOutput = (node) => node.outputs?.findIndex(({ type }) => type === "MODEL") ?? -1;

// Put a Select Attention behind a node's MODEL output and move everything that was connected there behind it. One step of undo.
export function putBehind(node) {
  const slot = modelOutput(node), { graph } = node;
  graph.beforeChange();
  const added = window.LiteGraph.createNode(SELECTOR);
  graph.add(added);
  added.pos = freePlace(graph, [node.pos[0] + node.size[0] + GAP, node.pos[1]], added.size);
  const targets = (node.outputs[slot].links ?? []).map((id) => graph.getLink?.(id) ?? graph.links.get(id));
  const ends = targets.map(({ target_id, target_slot }) => [graph.getNodeById(target_id) ?? target_id, target_slot]);
  node.connect(slot, added, 0);
  for (const [target, place] of ends) {
    if (target?.id !== undefined) added.connect(0, target, place);
    else graph.outputNode?.slots?.[place]?.connect?.(added.outputs[0], added); // the output of the subgraph that this is in
  }
  graph.afterChange();
  app.canvas.selectNode?.(added);
  app.extensionManager.workflow?.activeWorkflow?.changeTracker?.checkState?.();
  return added;
}

// The wanted place, or the next one below it where nothing is.
function freePlace(graph, [x, y], [width, height]) {
  const overlaps = (node) => node.pos[0] < x + width && x < node.pos[0] + node.size[0] && node.pos[1] - 30 < y + height && y - 30 < node.pos[1] + node.size[1];
  for (let tries = 0; tries < 100; tries++) {
    const hit = graph.nodes.find((node) => overlaps(node));
    if (!hit) break;
    y = hit.pos[1] + hit.size[1] + 30 + GAP;
  }
  return [x, y];
}

// The open graph with this pack's nodes in place of core's, by the same rules as scripts/convert_workflow.py. Undo brings the one before back.
async function convert() {
  const before = app.rootGraph?.serialize() ?? app.graph.serialize();
  const answer = await api.fetchApi("/flux2_attention/convert", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(before) });
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) return tell(t("nothing to convert"), found.error ?? `The server answered ${answer.status}.`, "error");
  if (!found.changed) return tell(t("nothing to convert"), found.text, "warn");
  const had = new Set([...everyNode()].filter(({ comfyClass }) => comfyClass === SELECTOR).map((node) => node.id));
  const workflow = app.extensionManager.workflow?.activeWorkflow;
  const tracker = workflow?.changeTracker, steps = [...(tracker?.undoQueue ?? []), before];
  await app.loadGraphData(found.workflow, true, false, workflow ?? null);
  for (const node of everyNode()) if (node.comfyClass === SELECTOR && !had.has(node.id)) promote(node);
  if (tracker) { // loading a graph counts as opening it: the one before is a step of undo here, and the only one of this command
    tracker.checkState?.();
    tracker.undoQueue.splice(0, Infinity, ...steps);
  }
  const { dialog, main } = openPanel(t("converted"), [button(t("close"), () => dialog.close())], "narrow");
  main.append(make("pre", { textContent: found.text }));
}

// Offer the kernel on the node of the subgraph that a selector is in.
function promote(node) {
  const { graph } = node, slot = node.inputs.find(({ name }) => name === "backend");
  if (graph.isRootGraph || !graph.addInput || !slot || slot.link != null) return;
  graph.addInput(PROMOTED, "COMBO").connect(slot, node);
}

function tell(summary, detail, severity) {
  app.extensionManager.toast?.add({ severity, summary, detail, life: 12000 });
}

app.registerExtension({
  name: "flux2_attention.insert",
  commands: [{ id: COMMAND, label: "Use Flux 2 Attention in this workflow", menubarLabel: "Use in this workflow", icon: "pi pi-bolt", function: convert }],
  menuCommands: [{ path: ["Extensions", "Flux 2 Attention"], commands: [COMMAND] }],
  setup() { // the list that opens when a MODEL link is dropped on the canvas
    const suggested = (window.LiteGraph.slot_types_default_out.MODEL ??= []);
    if (!suggested.includes(SELECTOR)) suggested.unshift(SELECTOR);
  },
  getNodeMenuItems(node) {
    if (modelOutput(node) < 0 || node.comfyClass === SELECTOR) return [];
    return [{ content: t("put behind"), callback: () => putBehind(node) }];
  },
});
