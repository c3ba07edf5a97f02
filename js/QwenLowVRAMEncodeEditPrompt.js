// The sizes that Encode Edit Prompt used, on the node, as its last run told them. Changes no value.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "QwenLowVRAMEncodeEditPrompt";
const HEIGHT_PX = 76; // four lines: the output and three pictures
const WIDTH_PX = 420; // of a new node
const MARGIN_PX = 10; // the page keeps it free on every side

const panels = new WeakMap(); // node -> its element: goes when its node goes

/** The panel of a node by its id as the server gives it: inside subgraphs "12:5", node 5 of node 12's graph. */
function panelOf(id) {
  let graph = app.rootGraph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return panels.get(node);
}

function show(id, output) {
  const panel = panelOf(id);
  if (panel && output?.text) panel.textContent = output.text.join("\n");
}

app.registerExtension({
  name: "qwenLowVRAM.encodeEditPrompt",

  setup() {
    api.addEventListener("executed", ({ detail }) => show(detail.display_node ?? detail.node, detail.output));
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const panel = document.createElement("div");
    panel.className = "qwen-lowvram-sizes";
    panel.textContent = "Run the graph to see the sizes.";
    panel.style.cssText =
      `box-sizing:border-box;width:100%;height:100%;min-height:${HEIGHT_PX}px;padding:6px 8px;overflow:auto;` +
      "white-space:pre-wrap;user-select:text;border-radius:4px;font:11px/16px monospace;" +
      "color:var(--input-text);background:var(--comfy-input-bg)";
    panels.set(node, panel);
    const limits = { margin: MARGIN_PX, getMinHeight: () => HEIGHT_PX + 2 * MARGIN_PX };
    const name = "qwen_lowvram_sizes";
    const widget = node.addDOMWidget(name, name, panel, { serialize: false, ...limits });
    node.setSize([Math.max(node.size[0], WIDTH_PX), node.size[1]]); // a saved size comes later and wins
    widget.serialize = false; // neither in the prompt nor in the file, where it would take an input's place
  },

  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) show(id, output);
  },
});
