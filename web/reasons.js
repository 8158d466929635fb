// Why a node of this pack failed or was refused: the first sentence as a red badge and a message, the whole text with a copy button and the section of
// docs/troubleshooting.md that explains it behind a click.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addBadge, forget, show, stateOf } from "./badge.js";
import { button, copy, everyNode, goTo, isOurs, make, markdown, nodeOfExecution, openPanel } from "./page.js";
import { said, t } from "./texts.js";

const MORE = /^More: (\S*docs\/troubleshooting\.md#([\w-]+)).*$/m; // the last line of a sentence that has a section
const SECONDS = 12;
// Messages appear where ComfyUI shows its own note of an error, with its button: this pack's go to the left of that.
const STYLE = ".p-toast .flux2-message { position: relative; right: var(--flux2-beside, 0); }";
const NOTE = "[data-testid=error-overlay]", MESSAGE = 440; // px that a message takes, with the margin of its column

// The first sentence that says why: of a list of reasons the first one, otherwise the first line.
export function firstSentence(text) {
  const lines = text.split("\n"), reason = lines.find((line) => line.startsWith("- "))?.slice(2);
  const sentence = (reason ?? lines[0]).trim();
  return sentence.match(/^.{20,}?[.!?](?=\s|$)/)?.[0] ?? sentence;
}

// ComfyUI puts the input's name in front of what validate_inputs answers, and the error's class before what a node raised.
function plain(text) {
  return text.trim().replace(/^(?:[\w/\\-]*\.)*[\w-]*(?:Error|Refused|Failed|Lost|Replicable|Found|Exception): (?=\S)/, "");
}

function fail(node, text, from) {
  const report = plain(text), sentence = firstSentence(report);
  const backend = report.match(/^Attention backend '([^']+)'/)?.[1];
  const line = backend ? `${backend} ${t("refused")}: ${sentence}` : sentence;
  show(node, { from, tokens: [], token: null, state: "failed", text: line, report, open: () => openReason(node.title, report) });
  app.extensionManager.toast?.add({ severity: "error", summary: node.title, detail: said(sentence), life: SECONDS * 1000, styleClass: "flux2-message" });
  keepBesideTheNote();
}

// The note comes before or after the message, and moves when a panel opens at the right.
async function keepBesideTheNote() {
  for (let tenths = 0; tenths < SECONDS * 10; tenths++) {
    const note = document.querySelector(NOTE)?.getBoundingClientRect();
    const beside = note?.width ? Math.max(0, Math.min(innerWidth - note.left, innerWidth - MESSAGE)) : 0;
    document.documentElement.style.setProperty("--flux2-beside", `${beside}px`);
    await new Promise((done) => setTimeout(done, 100));
  }
}

export function openReason(title, report) {
  const section = report.match(MORE)?.[2];
  const buttons = [
    section ? button(t("explain"), () => openTroubles(section)) : null,
    button(t("copy"), (made) => copy(report, made)),
    button(t("close"), () => dialog.close()),
  ].filter(Boolean);
  const { dialog, main } = openPanel(title, buttons, "narrow");
  main.append(make("pre", { className: "reason", textContent: said(report.replace(MORE, "").trim()) }));
}

async function openTroubles(section) {
  const { dialog, main } = openPanel(t("troubleshooting"), [button(t("close"), () => dialog.close())]);
  const answer = await api.fetchApi("/flux2_attention/troubleshooting");
  main.replaceChildren(...(answer.ok ? markdown(await answer.text()) : [t("no troubleshooting")]));
  goTo(main, section);
}

// --- what ComfyUI says

function validated(errors) { // {node id: {errors: [{message, details}]}}, from the answer to a queued prompt
  for (const [id, { errors: found }] of Object.entries(errors ?? {})) {
    const node = nodeOfExecution(id), wrong = found?.[0];
    if (!wrong || !isOurs(node)) continue;
    const sentence = wrong.type === "custom_validation_failed" ? wrong.details.replace(/^[\w.]+ - /, "") : `${wrong.message}: ${wrong.details}`;
    fail(node, sentence, "validation");
  }
}

// The page keeps what a refused prompt was answered to itself, so the call is wrapped.
function listen() {
  const { queuePrompt } = api;
  api.queuePrompt = async function (...args) {
    for (const node of everyNode()) {
      forget(node, "validation");
      if (isOurs(node) && stateOf(node)?.from === "execution") forget(node);
    }
    try {
      const answer = await queuePrompt.apply(this, args);
      validated(answer?.node_errors);
      return answer;
    } catch (error) {
      validated(error?.response?.node_errors);
      throw error;
    }
  };
  api.addEventListener("execution_error", ({ detail }) => {
    const node = nodeOfExecution(detail.node_id);
    if (isOurs(node)) fail(node, detail.exception_message ?? "", "execution");
  });
}

app.registerExtension({
  name: "flux2_attention.reasons",
  setup() {
    document.head.append(make("style", { textContent: STYLE }));
    listen();
  },
  nodeCreated(node) {
    if (isOurs(node)) addBadge(node);
  },
});
