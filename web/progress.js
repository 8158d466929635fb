// What a node says while it runs: in its report where it has one, otherwise on its badge. Neither makes the node larger, as ComfyUI's own progress texts do,
// which then lie on the nodes below.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { forget, show } from "./badge.js";
import { nodeOfExecution } from "./page.js";
import { openReason } from "./reasons.js";
import { boxOf } from "./report.js";

const EVENT = "flux2_attention_progress", FROM = "progress";
const saying = new Set();

function say(node, text) {
  saying.add(node);
  const box = boxOf(node);
  if (box) box.say(text);
  else show(node, { from: FROM, state: "running", text, open: () => openReason(node.title, text) });
}

function hush(node) {
  if (!saying.delete(node)) return;
  boxOf(node)?.say("");
  forget(node, FROM);
}

app.registerExtension({
  name: "flux2_attention.progress",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      const node = nodeOfExecution(detail.node);
      if (node) say(node, detail.text);
    });
    api.addEventListener("executed", ({ detail }) => hush(nodeOfExecution(detail.display_node ?? detail.node)));
    for (const end of ["execution_success", "execution_error", "execution_interrupted"]) api.addEventListener(end, () => [...saying].forEach(hush));
  },
});
