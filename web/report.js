// The texts that nodes give: on the node itself, tables as tables, whole in a window, and marked when they are of an earlier run. ComfyUI's page shows texts by
// itself only on its own preview nodes.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { button, copy, everyNode, make, nodeAt, nodeOfExecution, openPanel } from "./page.js";
import { said, t } from "./texts.js";

// node -> least [width, height] in pixels of a new one, as large as what it shows
const SIZES = {
  Flux2AttentionReport: [420, 320], Flux2CompareAttention: [520, 760], Flux2BenchmarkAttention: [520, 520], Flux2WarmUp: [420, 420], Flux2ModelInfo: [420, 320], Flux2LoadLoRA: [400, 320],
  Flux2EncodePrompt: [400, 380], Flux2EncodePrompts: [400, 480], Flux2UpsamplePrompt: [400, 560],
};
const WIDGET = "report", LEAST_HEIGHT = 90;
const STYLE = `
  .flux2-report { position: relative; overflow: auto; contain: size; width: 100%; height: 100%; min-height: 90px; box-sizing: border-box; padding: 6px 8px; border-radius: 6px; background: var(--comfy-input-bg, #222);
    color: var(--input-text, #ddd); font: 12px/1.4 sans-serif; user-select: text; cursor: text; }
  .flux2-report p { margin: 0 0 3px; white-space: pre-wrap; overflow-wrap: anywhere; }
  .flux2-report .nothing { color: var(--descrip-text, #999); }
  .flux2-report .old { margin: 0 0 6px; padding: 3px 6px; border-radius: 4px; background: #f0b429; color: #3b2a00; }
  .flux2-report .words { margin: 0 0 6px; padding: 3px 6px; border-radius: 4px; background: var(--border-color, #4446); white-space: pre-wrap; }
  .flux2-report table { border-collapse: collapse; margin: 3px 0 8px; width: 100%; }
  .flux2-report th, .flux2-report td { padding: 2px 8px 2px 0; text-align: right; border-top: 1px solid var(--border-color, #4446); font-variant-numeric: tabular-nums; }
  .flux2-report th { font-weight: 600; border-top: 0; } .flux2-report th:first-child, .flux2-report td:first-child { text-align: left; }
  .flux2-pair { clear: both; max-width: 300px; margin: 4px 0 8px; } .flux2-pair img { display: block; width: 100%; }
  .flux2-pair img + img { position: absolute; inset: 0; } .flux2-pair input { width: 100%; margin: 4px 0 0; cursor: ew-resize; }
  .flux2-pair p { display: flex; justify-content: space-between; color: var(--descrip-text, #999); }
  .flux2-report > button { position: sticky; float: right; top: 0; border: 0; background: none; color: var(--descrip-text, #999); cursor: pointer; font-size: 14px; padding: 0 2px; }`;

// --- text to elements

// The columns of lines that are aligned by spaces: where every line has two or more. [[cell]] or null.
export function columns(lines) {
  if (lines.length < 2) return null;
  const width = Math.max(...lines.map((line) => line.length));
  const blank = (place) => lines.every((line) => (line[place] ?? " ") === " ");
  const edges = [];
  for (let start = 0; start < width; start++) {
    if (!blank(start)) continue;
    let end = start;
    while (end < width && blank(end)) end++;
    if (end - start >= 2 && start > 0 && end < width) edges.push([start, end]);
    start = end;
  }
  if (!edges.length) return null;
  return lines.map((line) => [...edges, [width, width]].map(([edge], place) => line.slice(place ? edges[place - 1][1] : 0, edge).trim()));
}

export function rendered(text) {
  const made = [], lines = text.split("\n");
  while (lines.length) {
    let rows = null, count = 0;
    while (count < lines.length && /\S {2,}\S/.test(lines[count])) count++;
    for (; count >= 2 && !rows; count--) if ((rows = columns(lines.slice(0, count)))) break;
    if (rows) {
      const number = (cell) => /\d/.test(cell), [head, ...body] = rows;
      const headed = !head.slice(1).some(number) && body.some((row) => row.slice(1).some(number));
      const row = (cells, tag) => make("tr", {}, cells.map((cell) => make(tag, { textContent: said(cell) })));
      made.push(make("table", {}, row(head, headed ? "th" : "td"), body.map((cells) => row(cells, "td"))));
      lines.splice(0, rows.length);
    } else {
      made.push(make("p", { textContent: said(lines.shift()) || " " }));
    }
  }
  return made;
}

// --- the box on the node

function addBox(node) {
  const body = make("div"), note = make("div", { className: "old", textContent: t("old report"), hidden: true });
  const open = button("⤢", () => openText(node.title, widget.value), { title: t("open window"), ariaLabel: t("open window") });
  const words = make("div", { className: "words", hidden: true });
  const box = make("div", { className: "flux2-report" }, open, words, note, body);
  box.addEventListener("pointerdown", (event) => event.stopPropagation()); // selecting text is not dragging the node
  box.addEventListener("wheel", (event) => box.scrollHeight > box.clientHeight && !event.ctrlKey && event.stopPropagation());
  let text = "";
  const fill = (value) => {
    text = String(value ?? "");
    open.hidden = !text;
    body.replaceChildren(...(text ? rendered(text) : [make("p", { className: "nothing", textContent: t(`placeholder ${node.comfyClass}`) })]));
  };
  const widget = node.addDOMWidget(WIDGET, "flux2_report", box, {
    serialize: false, hideOnZoom: false, getValue: () => text, setValue: fill, getMinHeight: () => LEAST_HEIGHT,
  });
  widget.label = "";
  widget.serialize = false; // it is neither saved nor sent: a saved graph has the same widgets with and without this file
  widget.markOld = (old) => (note.hidden = !old);
  widget.put = (element) => body.firstElementChild.after(element); // below the first line, which is the answer
  widget.say = (text) => ((words.hidden = !text), (words.textContent = said(text)));
  fill("");
  return widget;
}

function openText(title, text) {
  const { dialog, main } = openPanel(title, [button(t("copy"), (made) => copy(text, made)), button(t("close"), () => dialog.close())]);
  main.append(...rendered(text));
}

export const boxOf = (node) => node?.widgets?.find(({ name, markOld }) => name === WIDGET && markOld);

export function show(node, output) {
  const text = output?.text, box = boxOf(node);
  if (!box || text === undefined) return;
  box.value = Array.isArray(text) ? text.join("\n") : String(text);
  box.markOld(false);
}

// --- runs: a report that a failed run did not renew is of an earlier one

let waiting = new Set();

function watchRuns() {
  api.addEventListener("execution_start", () => (waiting = new Set([...everyNode()].filter((node) => boxOf(node)?.value))));
  api.addEventListener("execution_cached", ({ detail }) => detail.nodes?.forEach((id) => waiting.delete(nodeOfExecution(id))));
  api.addEventListener("executed", ({ detail }) => waiting.delete(nodeOfExecution(detail.display_node ?? detail.node)));
  for (const end of ["execution_error", "execution_interrupted"]) {
    api.addEventListener(end, () => waiting.forEach((node) => boxOf(node).markOld(true)));
  }
}

app.registerExtension({
  name: "flux2_attention.report",
  setup() {
    document.head.append(make("style", { textContent: STYLE }));
    watchRuns();
  },
  nodeCreated(node) {
    const least = SIZES[node.comfyClass];
    if (!least) return;
    addBox(node);
    node.setSize(least.map((length, axis) => Math.max(length, node.computeSize()[axis])));
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.call(this, output);
      show(this, output);
    };
  },
  onNodeOutputsUpdated(outputs) { // a run opened from the queue's history
    for (const [locator, output] of Object.entries(outputs)) show(nodeAt(locator), output);
  },
});
