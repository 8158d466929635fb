// Shows the text of the report, compare, benchmark and model info nodes on the node itself. ComfyUI's page does that by itself only for its own preview nodes.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const PLACEHOLDERS = {
  Flux2AttentionReport: "After a run: which kernel ran, for how many calls, and how long a step took.",
  Flux2CompareAttention: "After a run: a verdict for each candidate, its errors and its time.",
  Flux2BenchmarkAttention: "After a run: the time of each backend, and why the others cannot run.",
  Flux2WarmUp: "After a run: what was run, and how long it took.",
  Flux2ModelInfo: "After a run: what the file is, where it belongs, and what is wrong with it.",
};
const WIDGET = "report";

function addText(node) {
  const { widget } = ComfyWidgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app);
  widget.label = "";
  widget.serialize = false; // it is neither saved nor sent: a saved graph has the same widgets with and without this file
  widget.options = { ...widget.options, read_only: true, serialize: false };
  if (widget.element) {
    widget.element.readOnly = true;
    widget.element.placeholder = PLACEHOLDERS[node.comfyClass];
  }
  return widget;
}

function show(node, output) {
  const text = output?.text;
  const widget = node?.widgets?.find(({ name }) => name === WIDGET);
  if (widget && text !== undefined) widget.value = Array.isArray(text) ? text.join("\n") : String(text);
}

app.registerExtension({
  name: "flux2_attention.report",
  nodeCreated(node) {
    if (!(node.comfyClass in PLACEHOLDERS)) return;
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
      if (node?.comfyClass in PLACEHOLDERS) show(node, output);
    }
  },
});
