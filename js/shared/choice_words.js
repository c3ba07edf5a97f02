// The choices of this pack's nodes in Chinese, on such a page. A choice's value, in the graph and in the prompt, stays what
// it is, and is shown beside its Chinese word: tooltips and help call it by that.
import { app } from "../../../scripts/app.js";
import { words } from "./panels.js";
import { isChinese } from "./run_words.js";

const OURS = "QwenLowVRAM"; // what the classes of this pack's nodes begin with
// lists of files: the page lets a person search in them, but not where choices have labels
const FILES = new Set(["transformer", "text_encoder", "vae", "lora_name"]);
const WORDS = {
  "auto": "自动（auto）",
  "as stored": "与文件相同（as stored）",
  "fastest": "最快（fastest）",
  "off": "关闭（off）",
  "exact": "精确（exact）",
  "fast": "快速（fast）",
  "all cards": "所有显卡（all cards）",
  "planned_28": "计算 28 步（planned_28）",
  "planned_20": "计算 20 步（planned_20）",
  "planned_12": "计算 12 步（planned_12）",
  "first_block": "按第 0 块（first_block）",
  "as set": "按上面的设置（as set）",
  "Lightning, 8 steps": "Lightning，8 步",
  "Lightning, 4 steps": "Lightning，4 步",
  "2.1-Turbo, 8 steps": "2.1-Turbo，8 步",
  "show": "显示（show）",
  "clear unused": "清理未使用的权重（clear unused）",
  "clear all": "清理全部权重（clear all）",
  "clear prompts": "清理提示词（clear prompts）",
};

const labelOf = (value) => WORDS[value] ?? value ?? "";

app.registerExtension({
  name: "qwenLowVRAM.choiceWords",

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith(OURS) || !isChinese(words())) return;
    for (const { type, name, options } of node.widgets ?? [])
      if (type === "combo" && !FILES.has(name)) options.getOptionLabel = labelOf;
  },
});
