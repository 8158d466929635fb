// What the templates say themselves, their notes and the titles of their groups, in the language of the page. ComfyUI translates the titles of nodes; the rest
// is a part of the graph. Only what stands in a graph word by word as in the templates is replaced, so a note that somebody wrote stays as it is.
import { app } from "../../scripts/app.js";
import { everyNode, isOurs } from "./page.js";
import { noted } from "./texts.js";

const NOTE = "MarkdownNote";

function translate() {
  const nodes = [...everyNode()], root = app.rootGraph ?? app.graph;
  if (!nodes.some(isOurs)) return;
  for (const node of nodes) {
    if (node.type !== NOTE) continue;
    node.title = noted(node.title);
    for (const widget of node.widgets ?? []) widget.value = noted(widget.value);
  }
  for (const graph of [root, ...(root.subgraphs?.values() ?? [])]) {
    for (const group of graph.groups) group.title = noted(group.title);
  }
}

app.registerExtension({ name: "flux2_attention.notes", afterConfigureGraph: translate });
