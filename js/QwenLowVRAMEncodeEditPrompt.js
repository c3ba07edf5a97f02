// The sizes that Encode Edit Prompt used, on the node, as its last run told them, and one free input for another image.
// Changes no value.
import { growImageInputs } from "./shared/image_inputs.js";
import { showText } from "./shared/panels.js";

const LEAST_IMAGES = 3; // what every Edit model but the first is shown

showText({
  extension: "qwenLowVRAM.encodeEditPrompt",
  empty: { QwenLowVRAMEncodeEditPrompt: ["Run the graph to see the sizes.", "运行工作流后显示尺寸。"] },
  sentences: "sizes",
  name: "qwen_lowvram_sizes",
  className: "qwen-lowvram-sizes",
  css: "white-space:pre-wrap;font:11px/16px monospace",
  heightPx: 76, // four lines: the output and three images
  widthPx: 420, // of a new node
  created: (node) => growImageInputs(node, LEAST_IMAGES),
});
