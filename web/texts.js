// The words of this pack's page code in the language of the page: locales/<language>/main.json, under flux2Attention.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const known = await api.fetchApi("/i18n").then((answer) => answer.json()).catch(() => ({}));

// $1, $2 ... in a text stand for the values. English where a language lacks the text, the key where there is none.
export function t(key, ...values) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  const text = known[language]?.flux2Attention?.[key] ?? known.en?.flux2Attention?.[key] ?? key;
  return values.reduce((made, value, place) => made.replaceAll(`$${place + 1}`, () => value), text);
}
