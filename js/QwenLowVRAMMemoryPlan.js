// The tables on the Memory Plan and Memory Report nodes, as a node's last run gave them. Changes no value.
import { showText } from "./shared/panels.js";

showText({
  extension: "qwenLowVRAM.memoryPlan",
  empty: {
    QwenLowVRAMMemoryPlan: ["Run the graph to see the plan.", "运行工作流后显示计划。"],
    QwenLowVRAMMemoryReport: ["Run the graph to see the report.", "运行工作流后显示报告。"],
  },
  name: "qwen_lowvram_memory",
  className: "qwen-lowvram-memory",
  css: "white-space:pre;font:11px/16px monospace",
  linePx: 16,
  heightPx: 150,
  widthPx: 560, // of a new node
});
