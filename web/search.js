// Words that find a node in ComfyUI's search. The page ranks a node by whole words of its name only if they are one text: in a list they lose to every other
// node whose name merely resembles the word. So these nodes' search words, the most wanted first, become one text. (The page looks at the first 30 letters.)
import { app } from "../../scripts/app.js";

const NODES = ["Flux2SelectAttention", "Flux2LoadModel", "Flux2LoadTextEncoder", "Flux2LoadVAE"];

app.registerExtension({
  name: "flux2_attention.search",
  addCustomNodeDefs(definitions) {
    for (const name of NODES) {
      const words = definitions[name]?.search_aliases;
      if (Array.isArray(words)) definitions[name].search_aliases = words.join(" ");
    }
  },
});
