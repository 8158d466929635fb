// Compare Attention shows the reference and the first candidate under a slider, in both of ComfyUI's node designs. (Its own Compare Images needs the newer one.)
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { make, nodeAt } from "./page.js";
import { boxOf } from "./report.js";

const NODE = "Flux2CompareAttention", UI_KEY = "flux2_pair"; // [{filename, subfolder, type, name}] of the two

const address = ({ filename, subfolder, type }) => api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);

function pair([before, after]) {
  const over = make("img", { src: address(after), alt: after.name, draggable: false });
  const slide = make("input", { type: "range", min: 0, max: 100, value: 50, ariaLabel: `${before.name} | ${after.name}` });
  const cut = () => (over.style.clipPath = `inset(0 0 0 ${slide.value}%)`);
  slide.oninput = cut;
  cut();
  const images = make("div", { style: "position: relative" }, make("img", { src: address(before), alt: before.name, draggable: false }), over);
  return make("div", { className: "flux2-pair" }, images, slide, make("p", {}, make("span", { textContent: before.name }), make("span", { textContent: after.name })));
}

function show(node, output) {
  if (node?.comfyClass !== NODE || output?.[UI_KEY]?.length !== 2) return;
  const box = boxOf(node);
  box.pair?.remove();
  box.put((box.pair = pair(output[UI_KEY])));
}

app.registerExtension({
  name: "flux2_attention.slider",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const { onExecuted } = node;
    node.onExecuted = function (output) {
      onExecuted?.call(this, output);
      show(this, output);
    };
  },
  onNodeOutputsUpdated(outputs) { // a run opened from the queue's history
    for (const [locator, output] of Object.entries(outputs)) if (output?.[UI_KEY]) show(nodeAt(locator), output);
  },
});
