// A line on each node that works for this pack, ComfyUI's own too: how far encoding, sampling and decoding are. Comes
// with the first event of a node. Changes no value.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { addPanel, nodeAt, words } from "./panels.js";
import { clock, lineOf } from "./run_words.js";
import { isOfThisGraph } from "./runs.js";

const EVENT = "qwen_lowvram.progress";
const PANEL = "QwenLowVRAMSample"; // has a panel of its own
const HEIGHT_PX = 16;

const lines = new WeakMap(); // node -> {element, event}: goes when its node goes

function lineOn(node) {
  let line = lines.get(node);
  if (!line) {
    const element = document.createElement("div");
    element.className = "qwen-lowvram-line";
    element.setAttribute("role", "status");
    element.setAttribute("aria-live", "off"); // a screen reader would say nothing else
    element.style.cssText =
      `box-sizing:border-box;width:100%;height:${HEIGHT_PX}px;padding:0 8px;overflow:hidden;white-space:nowrap;` +
      "text-overflow:ellipsis;border-radius:4px;font:11px/16px sans-serif;font-variant-numeric:tabular-nums;" +
      "color:var(--input-text);background:var(--comfy-input-bg)";
    line = { element, event: null };
    lines.set(node, line);
    addPanel(node, element, { name: "qwen_lowvram_line", heightPx: HEIGHT_PX, widthPx: node.size[0], fixed: true });
  }
  return line;
}

function show(event) {
  const node = isOfThisGraph(event) && nodeAt(event.node);
  if (!node || node.comfyClass === PANEL) return;
  const line = lineOn(node);
  line.event = event;
  line.element.textContent = lineOf(words(), event);
}

function stop(event, word) {
  const line = isOfThisGraph(event) && lines.get(nodeAt(event.node_id));
  if (!line) return;
  const { step, steps, seconds, stage } = line.event;
  const done = stage === "stopped" ? step : step - 1;
  const said = words();
  line.element.textContent = steps ? said.after(said.stopped[word], Math.max(0, done), steps, clock(seconds)) : said.stopped[word];
}

app.registerExtension({
  name: "qwenLowVRAM.progress",

  setup() {
    api.addEventListener(EVENT, ({ detail }) => show(detail));
    api.addEventListener("execution_interrupted", ({ detail }) => stop(detail, "interrupted"));
    api.addEventListener("execution_error", ({ detail }) => stop(detail, "failed"));
  },
});
