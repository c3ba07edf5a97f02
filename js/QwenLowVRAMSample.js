// The panel on the Sample node: stage, memory and plan of a run, fed by the server's events. Changes no value.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { messageOf } from "./shared/error_words.js";
import { openFullView } from "./shared/full_view.js";
import { addPanel, ERROR_COLOR, nodeAt, words } from "./shared/panels.js";
import { clock, gib, isChinese, lineOf, paceOf, rowsOf, sentenceOf } from "./shared/run_words.js";
import { onPlanLine } from "./shared/plan_lines.js";
import { allNodes, errorOf, isOfThisGraph, onEndAgain } from "./shared/runs.js";

const NODE = "QwenLowVRAMSample";
const EVENT = "qwen_lowvram.progress";
const REPORT = "qwen_lowvram_report";
const HINT = "qwenLowVRAM.PreviewHintShown";
const PREVIEWS = "Comfy.Execution.PreviewMethod";
const HEIGHT_PX = 104;
const WIDTH_PX = 320; // of a new node
const BEFORE = new Set(["opening", "quantizing", "encoding", "encoding_image"]); // what Sample may wait for

const TEXT = "white-space:nowrap;overflow:hidden;text-overflow:ellipsis;";
const ROW = "display:flex;align-items:center;gap:6px;min-height:16px;";
const GRID = "display:grid;grid-template-columns:auto minmax(24px,1fr) auto;align-items:center;column-gap:6px;";
const TRACK = "position:relative;overflow:hidden;border-radius:2px;background:var(--border-color, #8886);";
const FILL = "height:100%;width:0;background:var(--p-primary-color, #4a90d9);";
const MARK = "position:absolute;top:0;width:2px;height:100%;background:currentColor;display:none;";
const BUTTON =
  "flex:0 0 auto;padding:0 6px;border:1px solid var(--border-color);border-radius:4px;cursor:pointer;" +
  "font:11px/14px sans-serif;color:var(--input-text);background:transparent;";
const UNSEEN = "position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)"; // but read aloud

const ENDS = { execution_interrupted: "interrupted", execution_error: "failed", execution_success: "" };

const panels = new WeakMap(); // node -> Panel: goes when its node goes
let ramTotalBytes = 0;

const percent = (share) => `${(100 * Math.min(1, Math.max(0, share || 0))).toFixed(1)}%`;

function make(part, css, ...children) {
  const element = document.createElement("div");
  element.dataset.part = part;
  element.style.cssText = css;
  element.append(...children);
  return element;
}

function button(part, action) {
  const element = document.createElement("button");
  element.type = "button";
  element.dataset.part = part;
  element.style.cssText = BUTTON;
  element.addEventListener("keydown", (event) => event.stopPropagation()); // Enter and space are not the page's then
  element.addEventListener("click", action);
  return element;
}

/** One kind of memory, a row of the grid: its name, a bar with a mark at the peak, the numbers. */
class MemoryRow {
  constructor(part, name) {
    this.fill = make("fill", FILL);
    this.mark = make("mark", MARK);
    this.track = make("track", `${TRACK}height:6px`, this.fill, this.mark);
    this.text = make("text", TEXT, "–");
    this.element = make(part, "display:contents", make("name", "", name), this.track, this.text);
  }

  /** A bar up to `total`, with a mark at the peak. */
  show(text, now, peak, total) {
    const known = typeof now === "number";
    this.track.style.display = this.mark.style.display = known ? "" : "none";
    this.fill.style.width = percent(now / (total || peak));
    this.mark.style.left = `min(${percent(peak / (total || peak))}, 100% - 2px)`;
    this.text.style.gridColumn = known ? "" : "2 / -1";
    this.text.textContent = text;
  }
}

class Panel {
  constructor() {
    this.words = words();
    this.stage = make("stage", "min-height:16px", this.words.idle);
    this.details = button("details", () => this.open());
    this.details.textContent = this.words.details;
    this.details.title = this.words.detailsHint;
    this.bar = make("bar", FILL);
    this.track = make("progress", `${TRACK}flex:1 1 auto;height:4px`, this.bar);
    this.track.setAttribute("role", "progressbar");
    this.track.setAttribute("aria-label", this.words.progress);
    this.pace = make("pace", "flex:0 0 auto");
    this.vram = new MemoryRow("vram", this.words.memory.vram);
    this.ram = new MemoryRow("ram", this.words.memory.ram);
    this.note = make("note", "");
    this.spoken = make("spoken", UNSEEN);
    this.spoken.setAttribute("role", "status");
    const progress = make("pace-row", ROW, this.track, this.pace, this.details);
    this.memory = make("memory", GRID, this.vram.element, this.ram.element);
    const css =
      `position:relative;box-sizing:border-box;width:100%;height:100%;min-height:${HEIGHT_PX}px;padding:4px 8px;` +
      "overflow:hidden;border-radius:4px;font:11px/16px sans-serif;font-variant-numeric:tabular-nums;user-select:text;" +
      "cursor:pointer;color:var(--input-text);background:var(--comfy-input-bg)";
    this.element = make("panel", css, this.stage, progress, this.memory, this.note, this.spoken);
    this.element.className = "qwen-lowvram-panel";
    this.element.addEventListener("click", ({ target }) => {
      if (!target.closest("button") && !String(getSelection())) this.open(); // the end of a selection is a click too
    });
    this.before = null; // what was shown before it waits
    this.begin(null);
  }

  /** What is done now, in a line; said aloud where it is another stage. */
  say(line, stage, share) {
    this.stage.textContent = line;
    this.bar.style.width = percent(share);
    this.track.setAttribute("aria-valuenow", Math.round(100 * (share || 0)));
    this.track.setAttribute("aria-valuetext", line);
    if (this.spoken.dataset.stage === stage) return;
    this.spoken.dataset.stage = stage;
    this.spoken.textContent = line;
  }

  /** Another node works first, for this one too. */
  wait(event) {
    if (event.prompt_id === this.prompt || event.done >= (event.total || 1)) return; // one of both has ended
    this.before ??= { line: this.stage.textContent, width: this.bar.style.width };
    this.say(this.words.waits(lineOf(this.words, event)), `waits for ${event.stage}`, event.done / event.total || 0);
  }

  /** The prompt has ended, and this node may not have been asked for anything. */
  othersEnded(prompt) {
    if (this.error && this.prompt !== prompt) {
      this.begin(prompt); // an earlier run's error is not true any more
      this.say(this.words.idle, "", 0);
    }
    if (!this.before) return;
    this.stage.textContent = this.before.line;
    this.bar.style.width = this.before.width;
    this.spoken.textContent = this.spoken.dataset.stage = "";
    this.before = null;
  }

  /** A run of another prompt: nothing is known of it yet. */
  begin(prompt) {
    this.prompt = prompt;
    this.run = null; // its last event
    this.report = null;
    this.error = "";
    this.ended = false; // other than well
    this.told = null; // what the note said before a refusal
    this.layOut(false);
    this.peakHeld = 0;
    this.pace.textContent = this.note.textContent = "";
    this.details.style.visibility = "hidden"; // until there is something to read
  }

  /** Memory and a note of two lines below it, or a message in the place of both: it says what to do. */
  layOut(message) {
    this.memory.style.display = message ? "none" : "grid";
    this.note.style.cssText =
      `${message ? "height:64px" : "max-height:32px"};overflow:auto;white-space:pre-line;overflow-wrap:anywhere`;
    this.note.scrollTop = 0;
  }

  /** What the next run would take: until one has run, and as long as it would be refused. */
  expect(line) {
    const { text, fits } = line ?? { text: "", fits: true };
    if (this.error) return; // it stays until the next run
    if (fits && this.run && !this.told) return;
    if (!fits) this.told ??= [...this.note.childNodes];
    const past = fits && this.run;
    this.layOut(!fits);
    this.note.replaceChildren(...(past ? this.told : [text]));
    this.note.title = past ? "" : text;
    this.note.style.color = fits ? "" : ERROR_COLOR;
    if (fits) this.told = null;
  }

  progress(event) {
    const { words: said } = this;
    this.before = null;
    this.note.title = "";
    if (event.prompt_id !== this.prompt) this.begin(event.prompt_id);
    if (this.told) this.layOut(false);
    this.told = null;
    this.say(lineOf(said, event), event.stage, event.share ?? event.done / event.total);
    if (!event.facts) return; // not planned yet
    const text = event.plan ?? this.run?.plan;
    this.run = { ...event, plan: text };
    this.details.style.visibility = "";
    const { seconds_per_step: measured, facts } = event;
    this.pace.textContent = measured ? said.pace(paceOf(measured)) : said.forecast(paceOf(facts.seconds_per_step));
    this.showMemory(event);
    if (event.stage === "modulation") this.note.textContent = ""; // the line above has two lines
    else if (event.stage === "sampling" && event.previews === false && !this.hinted()) this.hint();
    else if (event.stage !== "done" || !this.hinting) this.note.textContent = sentenceOf(said, facts);
    if (event.stage === "done" && this.hinting) app.extensionManager.setting.set(HINT, true);
  }

  showMemory({ vram_bytes: vram, peak_vram_bytes: peak, ram_bytes: ram, peak_ram_bytes: peakRam, ...event }) {
    const { facts, held_bytes: held } = event;
    const { limit_bytes: limit, ram_limit_bytes: ramLimit } = facts;
    const known = typeof vram === "number";
    this.vram.show(known ? this.words.numbers(gib(vram), gib(peak), gib(limit)) : this.words.noVram, vram, peak, limit);
    if (ramLimit && typeof held === "number") {
      this.peakHeld = Math.max(this.peakHeld, held);
      this.ram.show(this.words.ofLimit(gib(held), gib(ramLimit)), held, this.peakHeld, ramLimit);
    } else {
      const total = ramTotalBytes && gib(ramTotalBytes);
      this.ram.show(this.words.numbers(gib(ram), gib(peakRam), total), ram, peakRam, ramTotalBytes);
    }
  }

  hinted() {
    return this.hinting || app.extensionManager.setting.get(HINT) === true;
  }

  /** That previews are off, once, with the switch. */
  hint() {
    this.hinting = true;
    const on = button("previews", async () => {
      await app.extensionManager.setting.set(PREVIEWS, "auto");
      this.note.textContent = this.words.previewsOn;
    });
    on.textContent = this.words.switchPreviews;
    this.note.replaceChildren(this.words.previewsOff, " ", on);
  }

  /** The node's own output: what the run read. After a change of tabs it is all that is left of the run. */
  showReport(report) {
    const { facts, steps, seconds, passes, pass_seconds: computing } = report;
    if (!this.run) {
      const memory = { vram_bytes: report.peak_vram_bytes, ram_bytes: report.peak_ram_bytes };
      const pace = { seconds_per_step: passes ? computing / passes : null };
      const end = { stage: "done", step: steps, steps, seconds, share: 1, plan: report.plan_text, facts };
      this.progress({ ...report, ...end, ...memory, ...pace, prompt_id: null });
    }
    this.report = report;
    const { one_by_one: reason, fetched_bytes: read } = report;
    const { resident, elsewhere, blocks } = facts;
    if (this.hinting && !this.note.querySelector("button")) this.hinting = false;
    const told = reason ? this.words.oneByOne(reason) : this.words.read(gib(read), resident + elsewhere, blocks);
    if (!this.hinting) this.note.textContent = told;
    this.hinting = false;
  }

  stop(word) {
    this.before = null;
    this.ended = true;
    const { step, steps, seconds, stage } = this.run ?? {};
    const done = stage === "stopped" ? step : step - 1;
    const line = steps ? this.words.after(word, Math.max(0, done || 0), steps, clock(seconds)) : word;
    this.say(line, "stopped", this.run?.share);
    this.pace.textContent = "";
  }

  fail(error) {
    this.stop(this.words.stopped.failed);
    this.error = messageOf(isChinese(this.words), error);
    this.layOut(true);
    this.note.textContent = this.error.replace(/\n\n+/g, "\n");
    this.details.style.visibility = "";
    this.spoken.textContent = this.error;
  }

  open() {
    const { words: said, run, report, error } = this;
    if (!run && !error) return;
    const title = error ? said.error : report ? said.title : said.running;
    const rows = run ? rowsOf(said, run.facts, report) : [];
    openFullView(said, { title, error, rows, text: report?.text ?? run?.plan ?? "" });
  }
}

const panelOf = (id) => panels.get(nodeAt(id));

function showReport(id, output) {
  if (output?.[REPORT]) panelOf(id)?.showReport(output[REPORT][0]);
}

onPlanLine((id, line) => panelOf(id)?.expect(line));

function onProgress(event) {
  if (!isOfThisGraph(event)) return;
  const own = panelOf(event.node);
  if (own) own.progress(event);
  else if (BEFORE.has(event.stage)) for (const node of allNodes()) panels.get(node)?.wait(event);
}

function onEnd(event, word) {
  if (!isOfThisGraph(event)) return;
  const own = word && panelOf(event.node_id);
  if (own && event.prompt_id !== own.prompt) own.begin(event.prompt_id); // it came to nothing that was told of
  if (own && word === "failed") own.fail(errorOf(event));
  else if (own) own.stop(words().stopped[word]);
  for (const node of allNodes()) panels.get(node)?.othersEnded(event.prompt_id);
}

onEndAgain((kind, event) => onEnd(event, ENDS[kind]));

app.registerExtension({
  name: "qwenLowVRAM.sample",
  settings: [{ id: HINT, name: "The hint about previews was shown", type: "hidden", defaultValue: false }],

  async setup() {
    api.addEventListener(EVENT, ({ detail }) => onProgress(detail));
    api.addEventListener("executed", ({ detail }) => {
      if (isOfThisGraph(detail)) showReport(detail.display_node ?? detail.node, detail.output);
    });
    for (const kind of Object.keys(ENDS)) api.addEventListener(kind, ({ detail }) => onEnd(detail, ENDS[kind]));
    ramTotalBytes = (await api.getSystemStats()).system.ram_total;
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const panel = new Panel();
    panels.set(node, panel);
    addPanel(node, panel.element, { name: "qwen_lowvram_progress", heightPx: HEIGHT_PX, widthPx: WIDTH_PX, fixed: true });
  },

  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) if (!panelOf(id)?.ended) showReport(id, output);
  },
});
