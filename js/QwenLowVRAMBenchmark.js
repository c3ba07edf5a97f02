// What the Benchmark node's last run measured: a line and the numbers as JSON, and buttons that copy them. Changes no
// value.
import { copyText } from "./shared/clipboard.js";
import { addPanel, showText, words } from "./shared/panels.js";
import { isChinese } from "./shared/run_words.js";

const KIND = "QwenLowVRAMBenchmark";
const PANEL = "qwen_lowvram_benchmark";
const WIDTH_PX = 420; // of a new node
const COPIED_MS = 2000; // that a button says so
const WORDS = {
  en: {
    line: ["Copy line", "Copy the line, to paste it into a report"],
    json: ["Copy JSON", "Copy all numbers as JSON"],
    group: "Copy",
  },
  zh: {
    line: ["复制文本行", "复制这一行，以便粘贴到报告中"],
    json: ["复制 JSON", "以 JSON 复制全部数字"],
    group: "复制",
  },
};

/** Of what the panel shows: the line, and behind an empty one the JSON. Nothing before the first run. */
function resultOf(panel) {
  const [line, empty, ...json] = panel.textContent.split("\n");
  return empty === "" ? { line, json: json.join("\n") } : null;
}

function copy(panel, what) {
  const text = resultOf(panel)[what];
  return copyText(text, () => {
    const range = document.createRange();
    const start = panel.textContent.indexOf(text);
    range.setStart(panel.firstChild, start);
    range.setEnd(panel.firstChild, start + text.length);
    return range;
  });
}

function button(panel, what) {
  const element = document.createElement("button"); // which the keyboard reaches by itself
  const said = WORDS[isChinese(words()) ? "zh" : "en"];
  const [text, title] = said[what];
  element.type = "button";
  element.textContent = text;
  element.title = title;
  element.dataset.copy = what;
  element.style.cssText =
    "flex:1;min-width:0;padding:0 6px;border:1px solid var(--border-color);border-radius:4px;cursor:pointer;" +
    "font:11px/22px sans-serif;color:var(--input-text);background:var(--comfy-input-bg)";
  element.addEventListener("keydown", (event) => event.stopPropagation()); // Enter and space are not the page's then
  element.addEventListener("click", async () => {
    if (!resultOf(panel)) return;
    element.textContent = (await copy(panel, what)) ? words().copied : words().selected;
    setTimeout(() => (element.textContent = text), COPIED_MS);
  });
  return element;
}

showText({
  extension: "qwenLowVRAM.benchmark",
  empty: { [KIND]: ["Run the graph to measure this machine.", "运行工作流后显示测量结果。"] },
  name: PANEL,
  className: "qwen-lowvram-benchmark",
  css: "white-space:pre-wrap;overflow-wrap:anywhere;font:11px/16px monospace",
  heightPx: 150,
  widthPx: WIDTH_PX,
  created(node) {
    const panel = node.widgets.find((widget) => widget.name === PANEL).element;
    const row = document.createElement("div");
    row.className = "qwen-lowvram-copy";
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", WORDS[isChinese(words()) ? "zh" : "en"].group);
    row.style.cssText = "display:flex;gap:6px;width:100%";
    row.append(button(panel, "line"), button(panel, "json"));
    addPanel(node, row, { name: "qwen_lowvram_copy", heightPx: 24, widthPx: WIDTH_PX, fixed: true });
  },
});
