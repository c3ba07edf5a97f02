// The list on the Quantized Weights node, as the node's last run gave it. Changes no value.
import { showText } from "./shared/panels.js";

showText({
  extension: "qwenLowVRAM.weightCache",
  empty: { QwenLowVRAMWeightCache: "Run the graph to see the files." },
  name: "qwen_lowvram_weights",
  className: "qwen-lowvram-weights",
  css: "white-space:pre;font:11px/16px sans-serif;font-variant-numeric:tabular-nums",
  heightPx: 90,
  widthPx: 420, // of a new node
});
