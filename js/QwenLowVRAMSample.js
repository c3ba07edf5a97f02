// The panel on the Sample node: stage, memory and plan of a run, fed by the server's events. Changes no value.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addPanel, nodeAt } from "./shared/panels.js";

const NODE = "QwenLowVRAMSample";
const EVENT = "qwen_lowvram.progress";
const REPORT = "qwen_lowvram_report";
const HEIGHT_PX = 104;
const WIDTH_PX = 320; // of a new node

const TEXT = "white-space:nowrap;overflow:hidden;text-overflow:ellipsis;";
const ROW = "display:flex;align-items:center;gap:6px;height:16px;";
const GRID = "display:grid;grid-template-columns:auto minmax(24px,1fr) auto;align-items:center;column-gap:6px;";
const TRACK = "position:relative;overflow:hidden;border-radius:2px;background:var(--border-color, #8886);";
const FILL = "height:100%;width:0;background:var(--p-primary-color, #4a90d9);";
const MARK = "position:absolute;top:0;width:2px;height:100%;background:currentColor;display:none;";

const panels = new WeakMap(); // node -> Panel: goes when its node goes
let ramTotalBytes = 0;

const gib = (bytes) => (bytes / 2 ** 30).toFixed(2);
const percent = (share) => `${(100 * Math.min(1, Math.max(0, share || 0))).toFixed(1)}%`;

function make(part, css, ...children) {
  const element = document.createElement("div");
  element.dataset.part = part;
  element.style.cssText = css;
  element.append(...children);
  return element;
}

/** One kind of memory, a row of the grid: its name, a bar with a mark at the peak, the numbers. */
class MemoryRow {
  constructor(name) {
    this.fill = make("fill", FILL);
    this.mark = make("mark", MARK);
    this.track = make("track", `${TRACK}height:6px`, this.fill, this.mark);
    this.text = make("text", TEXT, "–");
    this.element = make(name.toLowerCase(), "display:contents", make("name", "", name), this.track, this.text);
  }

  show(now, peak, total) {
    const known = typeof now === "number";
    this.track.style.display = known ? "" : "none";
    this.mark.style.display = known ? "" : "none";
    this.fill.style.width = percent(now / (total || peak));
    this.text.style.gridColumn = known ? "" : "2 / -1";
    this.mark.style.left = `min(${percent(peak / (total || peak))}, 100% - 2px)`;
    const numbers = () => `${gib(now)}, peak ${gib(peak)}${total ? ` of ${gib(total)}` : ""} GiB`;
    this.text.textContent = known ? numbers() : "none of its own: the device uses RAM";
  }
}

class Panel {
  constructor() {
    this.where = "";
    this.stage = make("stage", `${TEXT}flex:1 1 auto`, "Waiting for a run");
    this.pace = make("pace", "flex:0 0 auto");
    this.bar = make("bar", FILL);
    this.vram = new MemoryRow("VRAM");
    this.ram = new MemoryRow("RAM");
    this.note = make("note", "height:32px;overflow:hidden;opacity:0.75");
    const progress = make("progress", `${TRACK}height:4px;margin:3px 0 5px`, this.bar);
    const head = make("head", ROW, this.stage, this.pace);
    const memory = make("memory", GRID, this.vram.element, this.ram.element);
    this.live = make("live", "", head, progress, memory, this.note);
    this.text = make("text", "display:none;height:100%;overflow:auto;white-space:pre-wrap;user-select:text");
    const css =
      `box-sizing:border-box;width:100%;height:100%;min-height:${HEIGHT_PX}px;padding:6px 8px;overflow:hidden;` +
      "border-radius:4px;font:11px/16px sans-serif;font-variant-numeric:tabular-nums;cursor:pointer;" +
      "color:var(--input-text);background:var(--comfy-input-bg)";
    this.element = make("panel", css, this.live, this.text);
    this.element.className = "qwen-lowvram-panel";
    this.element.addEventListener("click", () => this.toggle());
  }

  /** Show the plan or the report in full, or the run again. */
  toggle() {
    if (!this.text.textContent || String(getSelection())) return; // the end of a selection is a click too
    const open = this.text.style.display === "none";
    this.text.style.display = open ? "block" : "none";
    this.live.style.display = open ? "none" : "block";
  }

  explain(note, text) {
    this.note.textContent = note;
    this.text.textContent = text;
    this.element.title = `${text}\n\nClick to read this in the panel.`;
  }

  prepare() {
    this.where = this.pace.textContent = "";
    this.stage.textContent = "Preparing";
    this.bar.style.width = "0";
  }

  progress(run) {
    this.where = `step ${run.step}/${run.steps}, block ${run.block}/${run.blocks}`;
    const [stage, share] = {
      modulation: [`Timestep table, block ${run.block}/${run.blocks}`, 0],
      sampling: [`Sampling, ${this.where}`, (run.step - 1 + run.block / run.blocks) / run.steps],
      done: [`Done: ${run.steps} steps in ${run.seconds.toFixed(1)} s`, 1],
    }[run.stage];
    this.stage.textContent = stage;
    this.bar.style.width = percent(share);
    const { seconds_per_step: measured, forecast_seconds_per_step: forecast } = run;
    const expected = forecast ? `about ${forecast.toFixed(1)} s/step expected` : "";
    this.pace.textContent = measured ? `${measured.toFixed(2)} s/step` : expected;
    this.vram.show(run.vram_bytes, run.peak_vram_bytes, run.limit_bytes);
    this.ram.show(run.ram_bytes, run.peak_ram_bytes, ramTotalBytes);
    this.explain(run.plan.replace(/^\w+\([^:]*: |\)$/g, ""), run.plan);
  }

  /** The node's own output: what the run read. After a change of tabs it is all that is left of the run. */
  report(report) {
    const { plan, steps, seconds, fetched_blocks: fetched, one_by_one: reason } = report;
    if (!this.where) {
      const { blocks, limits } = plan;
      const end = { stage: "done", step: steps, block: blocks, blocks, limit_bytes: limits.vram_bytes };
      const memory = { vram_bytes: report.peak_vram_bytes, ram_bytes: report.peak_ram_bytes };
      this.progress({ ...report, ...end, ...memory, plan: report.plan_text, seconds_per_step: seconds / steps });
    }
    const read = `${fetched} blocks read (${gib(report.fetched_bytes)} GiB), ${plan.resident.length} stayed`;
    this.explain(reason ? `One prompt after another: ${reason}` : read, report.text);
  }

  stop(word) {
    this.stage.textContent = this.where ? `${word} at ${this.where}` : word;
    this.where = this.pace.textContent = "";
  }
}

const panelOf = (id) => panels.get(nodeAt(id));

function showReport(id, output) {
  if (output?.[REPORT]) panelOf(id)?.report(output[REPORT][0]);
}

app.registerExtension({
  name: "qwenLowVRAM.sample",

  async setup() {
    api.addEventListener(EVENT, ({ detail }) => panelOf(detail.node)?.progress(detail));
    api.addEventListener("executing", ({ detail }) => panelOf(detail)?.prepare());
    api.addEventListener("executed", ({ detail }) => showReport(detail.display_node ?? detail.node, detail.output));
    api.addEventListener("execution_interrupted", ({ detail }) => panelOf(detail.node_id)?.stop("Interrupted"));
    api.addEventListener("execution_error", ({ detail }) => panelOf(detail.node_id)?.stop("Failed"));
    ramTotalBytes = (await api.getSystemStats()).system.ram_total;
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const panel = new Panel();
    panels.set(node, panel);
    addPanel(node, panel.element, { name: "qwen_lowvram_progress", heightPx: HEIGHT_PX, widthPx: WIDTH_PX, fixed: true });
  },

  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) showReport(id, output);
  },
});
