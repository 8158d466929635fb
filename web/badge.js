// A badge on a node: one short line in a colour, and what a click on it opens. Nodes of this pack have one, and so has a subgraph's node, which shows that of
// the nodes inside.
import { app } from "../../scripts/app.js";
import { make } from "./page.js";
import { said } from "./texts.js";

const LONGEST = 39; // letters on a badge; a longer text is cut there and whole behind the click
const COLOURS = {
  ran: ["#e6f4ea", "#1e5631"], running: ["#e8eaed", "#3c4654"], other: ["#3b2a00", "#f0b429"], nothing: ["#3b2a00", "#f0b429"],
  cancelled: ["#e8eaed", "#3c4654"], failed: ["#ffffff", "#a12622"], fits: ["#e8eaed", "#3c4654"],
};
// In nodes that are page elements a row of badges is as long as its texts: a row that is longer than its node is cut in its texts.
const STYLE = `
  [data-testid^="node-body-"] > .h-5.w-full > div { min-width: 0; justify-content: start; }
  [data-testid^="node-body-"] > .h-5.w-full > div > div { display: block; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; line-height: 20px; }`;
const URGENT = ["failed", "other", "nothing", "running", "cancelled", "ran", "fits"]; // which of several a subgraph's node shows

const states = new WeakMap(); // node -> {state, text, open, ...}
let wanted = true; // the setting

// Nodes that are page elements draw their badges again when something reactive changes that a badge function has read. The extension manager is a
// reactive object of the page, so a counter kept on it is reactive too; where it is not, these nodes show the badge when they are drawn anew.
function changes() {
  app.extensionManager.flux2Attention ??= { count: 0 };
  return app.extensionManager.flux2Attention; // read back: what was assigned is the plain object
}

export const stateOf = (node) => states.get(node);

// status: {state: a key of COLOURS or null, text, open: what a click does, ...}; what it does not name stays as it was.
export function show(node, status) {
  const now = { ...states.get(node), ...status };
  now.badge = badgeOf(now);
  states.set(node, now);
  addBadge(node);
  redraw(node);
}

// Take back what `show` said, if it was said by the same `from`, or by anybody.
export function forget(node, from) {
  const known = states.get(node);
  if (known && (from === undefined || known.from === from)) show(node, { from: null, state: null, text: "", report: "", tokens: [], token: null });
}

function badgeOf({ state, text, open }) {
  const [fgColor, bgColor] = COLOURS[state] ?? [];
  if (!wanted || !fgColor || !text) return null;
  const words = said(text), cut = words.length > LONGEST ? `${words.slice(0, LONGEST - 1)}…` : words;
  return new window.LGraphBadge({ text: cut, fgColor, bgColor, onClick: () => open?.() });
}

function redraw(node) {
  changes().count += 1;
  node.setDirtyCanvas(true, true);
}

const having = new WeakSet();

export function addBadge(node) {
  if (!document.querySelector("style.flux2-badge")) document.head.append(make("style", { className: "flux2-badge", textContent: STYLE }));
  if (having.has(node)) return;
  having.add(node);
  const none = new window.LGraphBadge({ text: "" });
  node.badges.push(() => (changes().count, (node.subgraph ? inside(node) : states.get(node))?.badge ?? none));
}

// The most urgent state of the nodes in a subgraph, those of subgraphs in it included.
export function inside(node) {
  const found = node.subgraph.nodes.map((inner) => (inner.subgraph ? inside(inner) : states.get(inner))).filter((known) => known?.badge);
  return found.sort((a, b) => URGENT.indexOf(a.state) - URGENT.indexOf(b.state))[0];
}

export function setWanted(value, nodes) {
  if (wanted === value) return;
  wanted = value;
  if (app.canvas) for (const node of nodes()) if (states.has(node)) show(node, {}); // told once at the start too, before there is a graph
}
