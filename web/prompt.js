// The prompt nodes' button that clears the prompts kept on disk. What a run says is shown by report.js.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { button, make, openPanel } from "./page.js";
import { show } from "./report.js";
import { t } from "./texts.js";

const KEEPING = ["Flux2EncodePrompt", "Flux2EncodePrompts"];
const ROUTE = "/flux2_attention/prompt_cache/clear";

async function clear(node) {
  const answer = await api.fetchApi(ROUTE, { method: "POST" });
  if (!answer.ok) return show(node, { text: [t("not cleared", `${answer.status} ${answer.statusText}`)] });
  const { entries, bytes } = await answer.json();
  show(node, { text: [t("cleared", entries, (bytes / 2 ** 20).toFixed(1))] });
}

function ask(node) { // all prompts of all graphs go: not with one click
  const yes = button(t("delete"), () => (dialog.close(), clear(node)));
  const { dialog, main } = openPanel(t("clear prompts"), [yes, button(t("cancel"), () => dialog.close())], "narrow");
  main.append(make("p", { textContent: t("clear question") }));
}

app.registerExtension({
  name: "flux2_attention.prompt",
  nodeCreated(node) {
    if (!KEEPING.includes(node.comfyClass)) return;
    const made = node.addWidget("button", "clear prompts kept on disk", null, () => ask(node), { serialize: false });
    made.label = t("clear prompts");
    made.serialize = false; // neither in a saved graph nor in an exported API workflow
  },
});
