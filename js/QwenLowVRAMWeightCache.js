// The list on the Quantized Weights node, as the node's last run or clearing gave it, and buttons that clear. A button
// is no value: nothing of it is in the graph, so that no graph clears by itself.
import { app } from "../../scripts/app.js";
import { addPanel, post, showText, tellText } from "./shared/panels.js";

const KIND = "QwenLowVRAMWeightCache";
const WORDS = {
  en: {
    unused: ["Clear unused", "Remove the weights that are damaged, or whose model file is gone or changed."],
    all: ["Clear all weights", "Remove all quantized weights. They are made again when they are needed."],
    prompts: ["Clear prompts", "Remove the encoded prompts, and no weights."],
    failed: (why) => `Nothing was cleared: ${why}`,
    group: "Clear",
  },
  zh: {
    unused: ["清理未使用的权重", "删除已损坏的权重，以及模型文件已不存在或已改变的权重。"],
    all: ["清理全部权重", "删除全部量化权重。需要时会重新生成。"],
    prompts: ["清理提示词", "只删除已编码的提示词，不删除权重。"],
    failed: (why) => `未清理任何内容：${why}`,
    group: "清理",
  },
};

const setText = showText({
  extension: "qwenLowVRAM.weightCache",
  empty: { [KIND]: ["Run the graph to see the files.", "运行工作流后显示文件。"] },
  name: "qwen_lowvram_weights",
  className: "qwen-lowvram-weights",
  css: "white-space:pre;font:11px/16px sans-serif;font-variant-numeric:tabular-nums",
  heightPx: 90,
  widthPx: 420, // of a new node
});

function words() {
  const locale = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  return String(locale).startsWith("zh") ? WORDS.zh : WORDS.en;
}

async function clear(node, what) {
  try {
    const answer = await post("/qwen_lowvram/clear", { clear: what });
    const given = await answer.json();
    setText(node, given.text ? await tellText(given.text, given.parts) : words().failed(given.error));
  } catch (error) {
    setText(node, words().failed(error.message));
  }
}

function button(node, row, what) {
  const element = document.createElement("button"); // which the keyboard reaches by itself
  const [text, title] = words()[what];
  element.type = "button";
  element.textContent = text;
  element.title = title;
  element.dataset.clear = what;
  element.style.cssText =
    "flex:1;min-width:0;padding:0 6px;border:1px solid var(--border-color);border-radius:4px;cursor:pointer;" +
    "overflow:hidden;text-overflow:ellipsis;white-space:nowrap;" +
    "font:11px/22px sans-serif;color:var(--input-text);background:var(--comfy-input-bg)";
  element.addEventListener("keydown", (event) => event.stopPropagation()); // Enter and space are not the page's then
  element.addEventListener("click", async () => {
    if (element.getAttribute("aria-disabled")) return; // one request at a time
    for (const other of row.children) other.setAttribute("aria-disabled", "true"); // disabled ones lose the focus
    await clear(node, what);
    for (const other of row.children) other.removeAttribute("aria-disabled");
  });
  row.append(element);
}

app.registerExtension({
  name: "qwenLowVRAM.weightCache.buttons",

  nodeCreated(node) {
    if (node.comfyClass !== KIND) return;
    const row = document.createElement("div");
    row.className = "qwen-lowvram-clear";
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", words().group);
    row.style.cssText = "display:flex;gap:6px;width:100%";
    for (const what of ["unused", "all", "prompts"]) button(node, row, what);
    addPanel(node, row, { name: "qwen_lowvram_clear", heightPx: 24, widthPx: 420, fixed: true });
  },
});
