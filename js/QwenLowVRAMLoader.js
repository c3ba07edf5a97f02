// The line on the loader that says what the next run would take, before it is started, and a button that checks the
// graph's model files. Changes no value.
import { app } from "../../scripts/app.js";
import { MODEL_CHECK } from "./commands/model_check.js";
import { isChinese } from "./shared/run_words.js";
import { modelWords } from "./shared/model_words.js";
import { addPanel, ERROR_COLOR, nodeAt, words } from "./shared/panels.js";
import { onPlanLine } from "./shared/plan_lines.js";

const HEIGHT_PX = 48; // three lines at the width of a new node
const WIDTH_PX = 360;

const panels = new WeakMap(); // node -> its element: goes when its node goes

onPlanLine((id, line) => {
  const panel = panels.get(nodeAt(id));
  if (!panel) return;
  const { text, fits } = line ?? { text: "", fits: true };
  panel.textContent = text;
  panel.title = text;
  panel.style.color = fits ? "var(--input-text)" : ERROR_COLOR;
  panel.dataset.fits = line ? String(fits) : "";
});

function checkButton() {
  const button = document.createElement("button");
  const { title } = modelWords(isChinese(words()));
  button.type = "button";
  button.className = "qwen-lowvram-check pi pi-list-check";
  button.title = title;
  button.setAttribute("aria-label", title);
  button.style.cssText =
    "align-self:flex-start;padding:3px 5px;border:1px solid var(--border-color);border-radius:4px;cursor:pointer;" +
    "font-size:12px;color:var(--input-text);background:var(--comfy-input-bg)";
  button.addEventListener("keydown", (event) => event.stopPropagation());
  button.addEventListener("click", () => app.extensionManager.command.execute(MODEL_CHECK));
  return button;
}

app.registerExtension({
  name: "qwenLowVRAM.loader",

  nodeCreated(node) {
    if (node.comfyClass !== "QwenLowVRAMLoader") return;
    const row = document.createElement("div");
    row.style.cssText = `display:flex;gap:4px;width:100%;height:100%;min-height:${HEIGHT_PX}px`;
    const panel = document.createElement("div");
    panel.className = "qwen-lowvram-plan-line";
    panel.setAttribute("role", "status");
    panel.style.cssText =
      "flex:1;min-width:0;box-sizing:border-box;padding:0 4px;overflow:auto;white-space:pre-line;" +
      "user-select:text;font:11px/16px sans-serif;font-variant-numeric:tabular-nums;color:var(--input-text)";
    row.append(panel, checkButton());
    panels.set(node, panel);
    addPanel(node, row, { name: "qwen_lowvram_plan_line", heightPx: HEIGHT_PX, widthPx: WIDTH_PX, fixed: true });
  },
});
