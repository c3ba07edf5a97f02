// The list on the Quantized Weights node, as the node's last run gave it. Changes no value.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "QwenLowVRAMWeightCache";
const HEIGHT_PX = 90;
const WIDTH_PX = 420; // of a new node
const MARGIN_PX = 10; // the page keeps it free on every side

const lists = new WeakMap(); // node -> its element: goes when its node goes

/** The list of a node by its id as the server gives it: inside subgraphs "12:5", node 5 of node 12's graph. */
function listOf(id) {
  let graph = app.rootGraph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return lists.get(node);
}

function show(id, output) {
  const list = listOf(id);
  if (list && output?.text) list.textContent = output.text.join("\n");
}

app.registerExtension({
  name: "qwenLowVRAM.weightCache",

  setup() {
    api.addEventListener("executed", ({ detail }) => show(detail.display_node ?? detail.node, detail.output));
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const list = document.createElement("div");
    list.className = "qwen-lowvram-weights";
    list.textContent = "Run the graph to see the files.";
    list.style.cssText =
      `box-sizing:border-box;width:100%;height:100%;min-height:${HEIGHT_PX}px;padding:6px 8px;overflow:auto;` +
      "white-space:pre;user-select:text;border-radius:4px;font:11px/16px sans-serif;" +
      "font-variant-numeric:tabular-nums;color:var(--input-text);background:var(--comfy-input-bg)";
    lists.set(node, list);
    const limits = { margin: MARGIN_PX, getMinHeight: () => HEIGHT_PX + 2 * MARGIN_PX };
    const name = "qwen_lowvram_weights";
    const widget = node.addDOMWidget(name, name, list, { serialize: false, ...limits });
    node.setSize([Math.max(node.size[0], WIDTH_PX), node.size[1]]); // a saved size comes later and wins
    widget.serialize = false; // neither in the prompt nor in the file, where it would take an input's place
  },

  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) show(id, output);
  },
});
