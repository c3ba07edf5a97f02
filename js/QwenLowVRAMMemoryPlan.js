// The tables on the Memory Plan and Memory Report nodes, as a node's last run gave them. Changes no value.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODES = {
  QwenLowVRAMMemoryPlan: "Run the graph to see the plan.",
  QwenLowVRAMMemoryReport: "Run the graph to see the report.",
};
const HEIGHT_PX = 150;
const WIDTH_PX = 560; // of a new node
const MARGIN_PX = 10; // the page keeps it free on every side

const tables = new WeakMap(); // node -> its element: goes when its node goes

/** The table of a node by its id as the server gives it: inside subgraphs "12:5", node 5 of node 12's graph. */
function tableOf(id) {
  let graph = app.rootGraph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return tables.get(node);
}

function show(id, output) {
  const table = tableOf(id);
  if (table && output?.text) table.textContent = output.text.join("\n");
}

app.registerExtension({
  name: "qwenLowVRAM.memoryPlan",

  setup() {
    api.addEventListener("executed", ({ detail }) => show(detail.display_node ?? detail.node, detail.output));
  },

  nodeCreated(node) {
    if (!(node.comfyClass in NODES)) return;
    const table = document.createElement("div");
    table.className = "qwen-lowvram-memory";
    table.textContent = NODES[node.comfyClass];
    table.style.cssText =
      `box-sizing:border-box;width:100%;height:100%;min-height:${HEIGHT_PX}px;padding:6px 8px;overflow:auto;` +
      "white-space:pre;user-select:text;border-radius:4px;font:11px/16px monospace;" +
      "color:var(--input-text);background:var(--comfy-input-bg)";
    tables.set(node, table);
    const limits = { margin: MARGIN_PX, getMinHeight: () => HEIGHT_PX + 2 * MARGIN_PX };
    const name = "qwen_lowvram_memory";
    const widget = node.addDOMWidget(name, name, table, { serialize: false, ...limits });
    node.setSize([Math.max(node.size[0], WIDTH_PX), node.size[1]]); // a saved size comes later and wins
    widget.serialize = false; // neither in the prompt nor in the file, where it would take an input's place
  },

  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) show(id, output);
  },
});
