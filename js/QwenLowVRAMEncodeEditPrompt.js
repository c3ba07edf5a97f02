// The sizes that Encode Edit Prompt used, on the node, as its last run told them. Changes no value.
import { showText } from "./shared/panels.js";

showText({
  extension: "qwenLowVRAM.encodeEditPrompt",
  empty: { QwenLowVRAMEncodeEditPrompt: "Run the graph to see the sizes." },
  name: "qwen_lowvram_sizes",
  className: "qwen-lowvram-sizes",
  css: "white-space:pre-wrap;font:11px/16px monospace",
  heightPx: 76, // four lines: the output and three images
  widthPx: 420, // of a new node
});
