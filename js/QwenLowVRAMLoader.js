// The line on the loader that says what the next run would take, before it is started. Changes no value.
import { app } from "../../scripts/app.js";
import { addPanel, nodeAt } from "./shared/panels.js";
import { onPlanLine, TOO_LARGE } from "./shared/plan_lines.js";

const HEIGHT_PX = 48; // three lines at the width of a new node
const WIDTH_PX = 360;

const panels = new WeakMap(); // node -> its element: goes when its node goes

onPlanLine((id, { text, fits }) => {
  const panel = panels.get(nodeAt(id));
  if (!panel) return;
  panel.textContent = text;
  panel.title = text;
  panel.style.color = fits ? "var(--input-text)" : TOO_LARGE;
  panel.dataset.fits = String(fits);
});

app.registerExtension({
  name: "qwenLowVRAM.loader",

  nodeCreated(node) {
    if (node.comfyClass !== "QwenLowVRAMLoader") return;
    const panel = document.createElement("div");
    panel.className = "qwen-lowvram-plan-line";
    panel.setAttribute("role", "status");
    panel.style.cssText =
      `box-sizing:border-box;width:100%;height:100%;min-height:${HEIGHT_PX}px;padding:0 4px;overflow:auto;` +
      "user-select:text;font:11px/16px sans-serif;font-variant-numeric:tabular-nums;color:var(--input-text)";
    panels.set(node, panel);
    addPanel(node, panel, { name: "qwen_lowvram_plan_line", heightPx: HEIGHT_PX, widthPx: WIDTH_PX, fixed: true });
  },
});
