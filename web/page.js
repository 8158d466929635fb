// What the pack's page code shares: nodes by the ids that the server and the page use, elements, dialogs, Markdown.
import { app } from "../../scripts/app.js";
import { t } from "./texts.js";

// --- nodes

export function* everyNode(graph = app.rootGraph ?? app.graph, seen = new Set()) {
  if (!graph || seen.has(graph)) return;
  seen.add(graph);
  for (const node of graph.nodes) {
    yield node;
    if (node.subgraph) yield* everyNode(node.subgraph, seen);
  }
}

export function nodeAt(locator) { // "12", or "<id of a subgraph>:12"
  const [id, subgraph] = String(locator).split(":").reverse();
  const root = app.rootGraph ?? app.graph;
  const graph = subgraph === undefined ? root : root.subgraphs?.get(subgraph);
  return graph?.getNodeById(id) ?? graph?.getNodeById(Number(id));
}

export function nodeOfExecution(id) { // "12", or "3:12" for node 12 inside node 3
  let node = null;
  for (const step of String(id).split(":")) {
    const graph = node ? node.subgraph : (app.rootGraph ?? app.graph);
    node = graph?.getNodeById(step) ?? graph?.getNodeById(Number(step));
  }
  return node;
}

// Whether a node is one of this pack, whatever its folder is called.
export function isOurs(node) {
  const home = (type) => window.LiteGraph.registered_node_types[type]?.nodeData?.python_module;
  return Boolean(node?.comfyClass && home(node.comfyClass) && home(node.comfyClass) === home("Flux2SelectAttention"));
}

// --- elements

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export async function copy(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a page that was not opened by https or from this machine has no clipboard of that kind
    const area = make("textarea", { value: text });
    (button.closest("dialog") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = t("copied");
  setTimeout(() => (button.textContent = label), 1500);
}

export const STYLE = `
  .flux2-dialog { width: min(1100px, 94vw); max-height: 88vh; padding: 0; border: 1px solid var(--border-color, #555); border-radius: 10px;
    background: var(--comfy-menu-bg, #222); color: var(--input-text, #ddd); font: 14px/1.45 sans-serif; }
  .flux2-dialog.narrow { width: min(760px, 94vw); }
  .flux2-dialog[open] { display: flex; flex-direction: column; }
  .flux2-dialog::backdrop { background: rgba(0, 0, 0, 0.55); }
  .flux2-dialog header, .flux2-dialog footer { display: flex; gap: 10px; align-items: center; padding: 12px 18px; }
  .flux2-dialog h2 { flex: 1; margin: 0; font-size: 17px; }
  .flux2-dialog main { overflow: auto; padding: 0 18px; flex: 1; }
  .flux2-dialog main h1, .flux2-dialog main h2 { font-size: 18px; margin: 18px 0 6px; } .flux2-dialog main h3 { font-size: 15px; margin: 16px 0 4px; }
  .flux2-dialog main .target { outline: 2px solid var(--p-primary-color, #0b8ce9); outline-offset: 6px; border-radius: 4px; }
  .flux2-dialog main blockquote { margin: 8px 0; padding: 2px 12px; border-left: 3px solid var(--border-color, #555); }
  .flux2-dialog main ul, .flux2-dialog main ol { padding-left: 22px; list-style: revert; }
  .flux2-dialog main a { color: #4a9eff; text-decoration: underline; cursor: pointer; }
  .flux2-dialog footer { justify-content: flex-end; border-top: 1px solid var(--border-color, #555); }
  .flux2-dialog footer p { flex: 1; margin: 0; }
  .flux2-dialog dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0 0 10px; }
  .flux2-dialog dt { color: var(--descrip-text, #999); } .flux2-dialog dd { margin: 0; }
  .flux2-dialog pre { margin: 0 0 12px; padding: 10px; white-space: pre-wrap; background: var(--comfy-input-bg, #333); border-radius: 6px; font-size: 12px; }
  .flux2-dialog table { width: 100%; border-collapse: collapse; margin-bottom: 14px; }
  .flux2-dialog caption { text-align: left; font-weight: 600; padding: 10px 0 4px; }
  .flux2-dialog td, .flux2-dialog th { border-top: 1px solid var(--border-color, #555); padding: 5px 12px 5px 0; vertical-align: top; text-align: left; }
  .flux2-dialog code { background: var(--comfy-input-bg, #333); border-radius: 4px; padding: 1px 5px; overflow-wrap: anywhere; user-select: all; }
  .flux2-dialog small { color: var(--descrip-text, #999); display: block; }
  .flux2-dialog button { background: var(--comfy-input-bg, #333); color: inherit; border: 1px solid var(--border-color, #555); border-radius: 6px;
    padding: 5px 12px; cursor: pointer; font: inherit; }
  .flux2-dialog header button { border: 0; background: none; font-size: 18px; line-height: 1; padding: 4px 8px; }
  .flux2-dialog td button { padding: 0 7px; font-size: 12px; margin-left: 6px; }
  .flux2-dialog .passed { color: #58b368; } .flux2-dialog .failed { color: #ff7b75; }
  :root:not(.dark-theme) body:not(.dark-theme) .flux2-dialog .passed { color: #1e6b34; } :root:not(.dark-theme) body:not(.dark-theme) .flux2-dialog .failed { color: #a12622; }`;

// A modal dialog with a title, a body and buttons; closed by its X, a click beside it, or Escape. Returns {dialog, main, note}.
export function openPanel(title, buttons = [], className = "") {
  document.querySelector(".flux2-dialog")?.close();
  const main = make("main"), note = make("p");
  const cross = make("button", { type: "button", textContent: "×", title: t("close"), ariaLabel: t("close") });
  const dialog = make("dialog", { className: `flux2-dialog ${className}` }, make("style", { textContent: STYLE }),
    make("header", {}, make("h2", { textContent: title }), cross), main, make("footer", {}, note, buttons));
  cross.onclick = () => dialog.close();
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // its own area is filled by the children
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("keydown", (event) => event.stopPropagation()); // the graph has shortcuts of its own
  document.body.append(dialog);
  dialog.showModal();
  return { dialog, main, note };
}

export function button(label, action, properties = {}) {
  const made = make("button", { type: "button", textContent: label, ...properties });
  made.onclick = () => action(made);
  return made;
}

// --- Markdown, as far as the pack's own pages use it: headings, lists, tables, code, emphasis, links

export function section(heading) { // the anchor that GitHub gives a heading
  return heading.toLowerCase().replace(/[^\p{L}\p{N}\s-]/gu, "").trim().replace(/\s/g, "-");
}

function inline(text) {
  const parts = text.split(/(`[^`]+`|\*\*[^*]+\*\*|\*[^*\s][^*]*\*|\[[^\]]+\]\([^)]+\))/);
  return parts.filter(Boolean).map((part) => {
    if (part.startsWith("`")) return make("code", { textContent: part.slice(1, -1) });
    if (part.startsWith("**")) return make("strong", {}, inline(part.slice(2, -2)));
    if (part.startsWith("*") && part.endsWith("*") && part.length > 2) return make("em", {}, inline(part.slice(1, -1)));
    const link = part.match(/^\[([^\]]+)\]\(([^)]+)\)$/);
    if (!link) return document.createTextNode(part);
    if (/^https?:/.test(link[2])) return make("a", { href: link[2], target: "_blank", rel: "noopener", textContent: link[1] });
    const made = make(link[2].startsWith("#") ? "a" : "span", { textContent: link[1] }); // a file of the repository is not here
    made.onclick = () => goTo(made.closest("main"), link[2].slice(1));
    return made;
  });
}

// Scroll to a section, and mark it.
export function goTo(main, id) {
  main?.querySelector(".target")?.classList.remove("target");
  const heading = [...(main?.querySelectorAll("h1, h2, h3") ?? [])].find((element) => element.id === id);
  heading?.classList.add("target");
  heading?.scrollIntoView({ block: "start" });
}

export function markdown(text) {
  const blocks = [], lines = text.split("\n");
  while (lines.length) {
    const line = lines.shift();
    const heading = line.match(/^(#+) (.*)/), item = /^\s*(?:[-*]|\d+\.) /;
    if (heading) blocks.push(make(`h${Math.min(heading[1].length, 3)}`, { id: section(heading[2]) }, inline(heading[2])));
    else if (line.startsWith("```")) {
      const code = [];
      while (lines.length && !lines[0].startsWith("```")) code.push(lines.shift());
      lines.shift();
      blocks.push(make("pre", { textContent: code.join("\n") }));
    } else if (line.startsWith(">")) {
      const quoted = [line];
      while (lines[0]?.startsWith(">")) quoted.push(lines.shift());
      blocks.push(make("blockquote", {}, markdown(quoted.map((one) => one.replace(/^> ?/, "")).join("\n"))));
    } else if (line.startsWith("|")) {
      const rows = [line];
      while (lines[0]?.startsWith("|")) rows.push(lines.shift());
      const cells = (row) => row.slice(1, -1).split("|").map((cell) => cell.trim());
      blocks.push(make("table", {}, rows.filter((row) => !/^[|\s:-]+$/.test(row)).map((row) => make("tr", {}, cells(row).map((cell) => make("td", {}, inline(cell)))))));
    } else if (item.test(line)) {
      const items = [line.replace(item, "")];
      while (lines.length && lines[0].trim() && (item.test(lines[0]) || /^\s/.test(lines[0]))) {
        if (item.test(lines[0])) items.push(lines.shift().replace(item, ""));
        else items.push(`${items.pop()} ${lines.shift().trim()}`);
      }
      blocks.push(make(/^\s*\d/.test(line) ? "ol" : "ul", {}, items.map((one) => make("li", {}, inline(one)))));
    } else if (line.trim()) {
      const words = [line];
      while (lines[0]?.trim() && !/^(#|```|>|\||\s*(?:[-*]|\d+\.) )/.test(lines[0])) words.push(lines.shift());
      blocks.push(make("p", {}, inline(words.join(" "))));
    }
  }
  return blocks;
}
