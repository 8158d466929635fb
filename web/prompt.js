// The prompt nodes: the text that a run gives on the node, and a button that clears the prompts kept on disk.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const KEEPING = ["Flux2EncodePrompt", "Flux2EncodePrompts"];
const NODES = [...KEEPING, "Flux2UpsamplePrompt"];
const PLACEHOLDER = "After a run: what was done, and what in the prompt FLUX.2 does not read as written.";
const PLACEHOLDERS = { Flux2UpsamplePrompt: "After a run: the better prompt, and how long it took to write." };
const WIDGET = "report";
const BUTTON = "clear prompts kept on disk";
const ROUTE = "/flux2_attention/prompt_cache/clear";

function addText(node) {
  const { widget } = ComfyWidgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app);
  widget.label = "";
  widget.serialize = false; // neither saved nor sent: a saved graph has the same widgets with and without this file
  widget.options = { ...widget.options, read_only: true, serialize: false };
  if (widget.element) {
    widget.element.readOnly = true;
    widget.element.placeholder = PLACEHOLDERS[node.comfyClass] ?? PLACEHOLDER;
  }
}

async function clear(node) {
  const answer = await api.fetchApi(ROUTE, { method: "POST" });
  if (!answer.ok) return show(node, { text: [`Nothing was cleared: the server answered ${answer.status}.`] });
  const { entries, bytes } = await answer.json();
  show(node, { text: [`Cleared: ${entries} prompts, ${(bytes / 2 ** 20).toFixed(1)} MiB.`] });
}

function show(node, output) {
  const text = output?.text;
  const widget = node?.widgets?.find(({ name }) => name === WIDGET);
  if (widget && text !== undefined) widget.value = Array.isArray(text) ? text.join("\n") : String(text);
}

app.registerExtension({
  name: "flux2_attention.prompt",
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    if (KEEPING.includes(node.comfyClass)) {
      const button = node.addWidget("button", BUTTON, null, () => clear(node));
      button.serialize = false;
    }
    addText(node);
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.call(this, output);
      show(this, output);
    };
  },
  onNodeOutputsUpdated(outputs) { // a run opened from the queue's history
    for (const [id, output] of Object.entries(outputs)) {
      const node = app.graph.getNodeById(id);
      if (NODES.includes(node?.comfyClass)) show(node, output);
    }
  },
});
