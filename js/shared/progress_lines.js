// A line on each node that works for this pack, ComfyUI's own too: how far encoding, sampling and decoding are, and what
// went wrong there. Comes with the first event of a node. Changes no value.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { fetchChinese, messageOf } from "./error_words.js";
import { addPanel, nodeAt, words } from "./panels.js";
import { onPlanLine } from "./plan_lines.js";
import { clock, isChinese, lineOf } from "./run_words.js";
import { allNodes, errorOf, isOfThisGraph, onEndAgain } from "./runs.js";

const EVENT = "qwen_lowvram.progress";
const PANEL = "QwenLowVRAMSample"; // has a panel of its own
const OF_THE_PLAN = new Set(["QwenLowVRAMLoader", PANEL]);
const OURS = "QwenLowVRAM"; // what the classes of this pack's nodes begin with
const LINE_PX = 16;
const ERROR_PX = 80; // five lines; the rest is scrolled to

const lines = new WeakMap(); // node -> its line: goes when its node goes

function lineOn(node) {
  let line = lines.get(node);
  if (!line) {
    const element = document.createElement("div");
    element.className = "qwen-lowvram-line";
    const name = "qwen_lowvram_line";
    const resize = addPanel(node, element, { name, heightPx: LINE_PX, widthPx: node.size[0], fixed: true });
    line = { element, resize, event: null };
    lines.set(node, line);
  }
  return line;
}

/** `failedIn`: the prompt whose error it is. */
function write(line, text, heightPx, failedIn = null) {
  const { element, resize } = line;
  const many = heightPx > LINE_PX;
  line.failedIn = failedIn;
  element.style.cssText =
    `box-sizing:border-box;width:100%;height:${heightPx}px;max-height:${heightPx}px;padding:0 8px;border-radius:4px;font:11px/16px sans-serif;` +
    "font-variant-numeric:tabular-nums;color:var(--input-text);background:var(--comfy-input-bg);user-select:text;" +
    (many
      ? "overflow:auto;white-space:pre-line;overflow-wrap:anywhere"
      : "overflow:hidden;white-space:nowrap;text-overflow:ellipsis");
  element.setAttribute("role", many ? "alert" : "status");
  element.setAttribute("aria-live", many ? "assertive" : "off"); // of steps, a screen reader would say nothing else
  if (element.textContent !== text) element.textContent = text;
  resize(heightPx);
}

function show(event) {
  const node = isOfThisGraph(event) && nodeAt(event.node);
  if (!node || node.comfyClass === PANEL) return;
  const line = lineOn(node);
  line.event = event;
  write(line, lineOf(words(), event), LINE_PX);
}

function interrupted(event) {
  const line = isOfThisGraph(event) && lines.get(nodeAt(event.node_id));
  if (!line) return;
  const { step, steps, seconds, stage } = line.event?.prompt_id === event.prompt_id ? line.event : {};
  const done = stage === "stopped" ? step : step - 1;
  const said = words();
  const word = said.stopped.interrupted;
  write(line, steps ? said.after(word, Math.max(0, done), steps, clock(seconds)) : word, LINE_PX);
}

/** The message itself, on the node. Errors of other nodes that are not about our models are ComfyUI's alone. */
function failed(event) {
  const node = isOfThisGraph(event) && nodeAt(event.node_id);
  if (!node || node.comfyClass === PANEL) return;
  const error = errorOf(event);
  if (!error.code && !node.comfyClass?.startsWith(OURS) && !lines.has(node)) return;
  const said = words();
  const text = messageOf(isChinese(said), error).replace(/\n\n+/g, "\n");
  write(lineOn(node), text, ERROR_PX, event.prompt_id ?? "");
}

/** Errors of earlier runs are not true any more, also on nodes that tell nothing else. */
function ended(event) {
  if (!isOfThisGraph(event)) return;
  for (const node of allNodes()) {
    const line = lines.get(node);
    if (line && line.failedIn !== null && line.failedIn !== event.prompt_id) write(line, "", 0);
  }
}

/** What is wrong with a node before the run; the loader and the sampler say it in places of their own. */
function expected(id, line) {
  const node = nodeAt(id);
  if (!node || OF_THE_PLAN.has(node.comfyClass)) return;
  const own = line ? lineOn(node) : lines.get(node);
  if (line) {
    write(own, line.text, ERROR_PX);
    own.expected = line.text;
  } else if (own?.expected && own.element.textContent === own.expected) write(own, "", 0);
}

onPlanLine(expected);
onEndAgain((kind, event) => (kind === "execution_error" ? failed(event) : interrupted(event)));

app.registerExtension({
  name: "qwenLowVRAM.progress",

  setup() {
    if (isChinese(words())) fetchChinese();
    api.addEventListener(EVENT, ({ detail }) => show(detail));
    api.addEventListener("execution_interrupted", ({ detail }) => interrupted(detail));
    api.addEventListener("execution_error", ({ detail }) => failed(detail));
    for (const end of ["execution_success", "execution_error", "execution_interrupted"])
      api.addEventListener(end, ({ detail }) => ended(detail));
  },
});
