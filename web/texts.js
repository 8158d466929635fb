// The words of this pack's page code in the language of the page: locales/<language>/main.json, under flux2Attention.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const known = await api.fetchApi("/i18n").then((answer) => answer.json()).catch(() => ({}));

const language = () => app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
const filled = (text, values) => values.reduce((made, value, place) => made.replaceAll(`$${place + 1}`, () => value), text);

// $1, $2 ... in a text stand for the values. English where a language lacks the text, the key where there is none.
export function t(key, ...values) {
  return filled(known[language()]?.flux2Attention?.[key] ?? known.en?.flux2Attention?.[key] ?? key, values);
}

// A text of the templates, paragraph by paragraph.
export function noted(text) {
  const words = known[language()]?.flux2Attention?.notes ?? {};
  return String(text).split("\n\n").map((part) => words[part.trim()] ?? part).join("\n\n");
}

// What a backend is, in one line: the summary of its row in attention/registry.py.
export function summed(summary) {
  return known[language()]?.flux2Attention?.backends?.[summary] ?? summary;
}

// --- what the server says: reports, badges, reasons. It says them in English, as they are logged and saved; "reports" in main.json has their sentences, with
// $1, $2 ... for what varies, and a sentence that is not there stays English. Figures and names of kernels are what varies.

const literal = (sentence) => sentence.replace(/\$\d/g, "");
const VALUE = "((?:(?![.!?] | · ).)+)"; // ends where a sentence or a part of the first line does
const SENTENCES = Object.keys(known.en?.flux2Attention?.reports ?? {}).sort((a, b) => literal(b).length - literal(a).length)
  .map((sentence) => [sentence, new RegExp(`^${sentence.replace(/[.*+?^()[\]\\]/g, "\\$&").replace(/\$\d/g, VALUE)}$`)]);
const SEPARATORS = [[" · ", " · "], [" | ", " | "], [/(?<=[.!?]) (?=\S)/, " "], [": ", ": "]];

function inWords(text, words) {
  for (const [sentence, pattern] of SENTENCES) {
    const found = words[sentence] && text.match(pattern);
    if (found) return filled(words[sentence], found.slice(1).map((value) => inWords(value, words)));
  }
  for (const [separator, between] of SEPARATORS) {
    const parts = text.split(separator), made = parts.map((part) => (parts.length > 1 ? inWords(part, words) : part));
    if (made.some((part, place) => part !== parts[place])) return made.join(between);
  }
  return text.endsWith(".") ? `${inWords(text.slice(0, -1), words)}.` : text; // what is also a part of a sentence
}

// A text of the server in the language of the page, line by line; two spaces or more stand between columns.
export function said(text) {
  const words = known[language()]?.flux2Attention?.reports;
  if (!words || language() === "en") return text;
  return text.split("\n").map((line) => line.replace(/\S+(?: \S+)*/g, (body) => inWords(body, words))).join("\n");
}
