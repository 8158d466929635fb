// Words that find a node in ComfyUI's search. The page ranks a node by whole words of its name only if they are one text: in a list they lose to every other
// node whose name merely resembles the word. So these nodes' search words become one text. The page looks at its first 30 letters, and takes a capital for the
// begin of a word, so they are written together: rocmAmdAiter.
import { app } from "../../scripts/app.js";

const NODES = ["Flux2SelectAttention", "Flux2LoadModel", "Flux2LoadTextEncoder", "Flux2LoadVAE"];

app.registerExtension({
  name: "flux2_attention.search",
  addCustomNodeDefs(definitions) {
    for (const name of NODES) {
      const words = definitions[name]?.search_aliases;
      const written = (word) => word.replace(/(?:^| )(.)/g, (_, first) => first.toUpperCase());
      if (Array.isArray(words)) definitions[name].search_aliases = [words[0], ...words.slice(1).map(written)].join("");
    }
  },
});
