// The tables on the Memory Plan and Memory Report nodes, as a node's last run gave them. Changes no value.
import { showText } from "./shared/panels.js";

showText({
  extension: "qwenLowVRAM.memoryPlan",
  empty: {
    QwenLowVRAMMemoryPlan: ["Run the graph to see the plan.", "运行工作流后显示计划。"],
    QwenLowVRAMMemoryReport: ["Run the graph to see the report.", "运行工作流后显示报告。"],
  },
  chineseBelow: {
    QwenLowVRAMMemoryPlan:
      "图表：蓝 weights that stay 常驻的权重，橙 weights passing through 传入的权重，绿 activations 激活值，\n" +
      "红虚线 limit 上限；encode 编码，load 加载，table 调制，sample 采样，decode 解码；bound by 瓶颈；further cards 其他显卡；\n" +
      "blocks stay 常驻的块，in RAM 在内存，from the file at each step 每步从文件读取，VAE whole / in tiles VAE 整图 / 分块，then 之后",
    QwenLowVRAMMemoryReport:
      "图表：RAM of this process ComfyUI 占用内存，limit 上限，black: highest in each stage 黑线为各阶段最高，far above this axis 远在此轴之上；\n" +
      "read from files 从文件读取，over the bus 经总线，waited for the disk / the bus 等待硬盘 / 总线；\n" +
      "encode 编码，load 加载，table 调制，sample 采样，decode 解码",
  }, // charts are written in Pillow's own font, which has no Chinese letters
  name: "qwen_lowvram_memory",
  className: "qwen-lowvram-memory",
  css: "white-space:pre;font:11px/16px monospace",
  linePx: 16,
  heightPx: 150,
  widthPx: 560, // of a new node
});
