// The panel on the Sample node: step, block, memory and seconds per step, fed by the server's events.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "QwenLowVRAMSample";
const EVENT = "qwen_lowvram.progress";
const HEIGHT_PX = 96;

const panels = new Map(); // node -> panel

function size(bytes) {
  return bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(2)} GiB` : `${(bytes / 2 ** 20).toFixed(0)} MiB`;
}

function memoryLine(name, now, peak, limit) {
  if (now === null || now === undefined) return `${name}: none of its own on this device`;
  return `${name}: ${size(now)}, peak ${size(peak)}${limit ? ` of ${size(limit)}` : ""}`;
}

function createPanel() {
  const element = document.createElement("div");
  element.className = "qwen-lowvram-panel";
  element.style.cssText =
    "box-sizing:border-box;width:100%;height:100%;overflow:hidden;padding:4px 6px;font:11px/1.4 sans-serif;" +
    "color:var(--input-text);background:var(--comfy-input-bg);border-radius:4px";
  const lines = ["stage", "vram", "ram", "plan"].map((part) => {
    const line = document.createElement("div");
    line.dataset.part = part;
    line.style.cssText = "white-space:nowrap;overflow:hidden;text-overflow:ellipsis";
    element.append(line);
    return line;
  });
  const track = document.createElement("div");
  track.style.cssText = "height:4px;margin:3px 0;border-radius:2px;background:var(--border-color)";
  const bar = document.createElement("div");
  bar.style.cssText = "height:100%;width:0;border-radius:2px;background:var(--p-primary-color, #4a90d9)";
  track.append(bar);
  element.insertBefore(track, lines[1]);
  lines[0].textContent = "Waiting for a run";
  return { element, lines, bar };
}

function showProgress(panel, run) {
  const [stage, vram, ram, plan] = panel.lines;
  const pace = run.seconds_per_step ? `, ${run.seconds_per_step.toFixed(2)} s/step` : "";
  const done = run.stage === "done";
  const sampling = `Step ${run.step}/${run.steps}, block ${run.block}/${run.blocks}${pace}`;
  stage.textContent = done
    ? `Done in ${run.seconds.toFixed(1)} s${pace}`
    : run.stage === "modulation"
      ? `Timestep table: block ${run.block}/${run.blocks}`
      : sampling;
  const share = done ? 1 : run.stage === "modulation" ? 0 : (run.step - 1 + run.block / run.blocks) / run.steps;
  panel.bar.style.width = `${(100 * share).toFixed(1)}%`;
  vram.textContent = memoryLine("VRAM", run.vram_bytes, run.peak_vram_bytes, run.limit_bytes);
  ram.textContent = memoryLine("RAM", run.ram_bytes, run.peak_ram_bytes);
  plan.textContent = run.plan;
  plan.title = run.plan;
}

// ids inside subgraphs are composite ("12:5"); the node itself knows only the last part
function isNode(node, id) {
  return id !== null && String(id).split(":").pop() === String(node.id);
}

app.registerExtension({
  name: "qwenLowVRAM.sample",

  setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      for (const [node, panel] of panels) if (isNode(node, detail.node)) showProgress(panel, detail);
    });
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const panel = createPanel();
    node.addDOMWidget("qwen_lowvram_progress", "qwen_lowvram_progress", panel.element, {
      serialize: false,
      getMinHeight: () => HEIGHT_PX,
      getMaxHeight: () => HEIGHT_PX,
    });
    panels.set(node, panel);
    const onRemoved = node.onRemoved;
    node.onRemoved = function (...args) {
      panels.delete(node);
      return onRemoved?.apply(this, args);
    };
  },
});
