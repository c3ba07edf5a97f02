// What the graph's next run would take, asked of the server while a person changes the graph. Changes no value.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const LOADER = "QwenLowVRAMLoader";
export const TOO_LARGE = "var(--error-text, #e05252)"; // the colour of a line that says so
const WAIT_MS = 400; // after the last change
const GIB = 2 ** 30;

const WORDS = {
  en: {
    line: (v) =>
      `${v.format}, ${v.resident} of ${v.blocks} blocks on the card, ${gib(v.peak_bytes)} of ${gib(v.limit_bytes)} GB, ` +
      `about ${number(v.seconds)} s/step ${v.measured ? "on this machine" : "on a typical card"}, limited by ${v.bound}`,
    bound: { compute: "computing", "the bus": "the bus", "the disk": "the disk", decoding: "decoding weights" },
    uncounted: (names) => `${names.join(", ")} not counted`,
    unknown: (v) => `planned for ${v.width}x${v.height}: the size is not known before the run`,
  },
  zh: {
    line: (v) =>
      `${v.format}，显卡上常驻 ${v.resident}/${v.blocks} 块，显存 ${gib(v.peak_bytes)}/${gib(v.limit_bytes)} GB，` +
      `${v.measured ? "本机" : "典型显卡"}每步约 ${number(v.seconds)} 秒，瓶颈：${v.bound}`,
    bound: { compute: "计算", "the bus": "总线", "the disk": "硬盘", decoding: "权重解码" },
    uncounted: (names) => `未计入 ${names.join("、")}`,
    unknown: (v) => `按 ${v.width}x${v.height} 计划：运行前无法得知尺寸`,
  },
};

const gib = (bytes) => (bytes / GIB).toFixed(1);
const number = (seconds) => (seconds < 10 ? seconds.toPrecision(2) : seconds.toFixed(0));

const listeners = [];
let timer;
let asked = "";

/** Call `listener(id, {text, fits})` with each line as it comes, by the ids of the nodes that it is for. */
export function onPlanLine(listener) {
  listeners.push(listener);
}

/** The line in the page's language. A refusal is as the server words it. */
function textOf(line) {
  const values = line.values;
  if (!line.fits || !values.blocks) return line.text;
  const locale = String(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en");
  const words = WORDS[locale.startsWith("zh") ? "zh" : "en"];
  const parts = [words.line({ ...values, bound: words.bound[values.bound] ?? values.bound })];
  if (values.uncounted.length) parts.push(words.uncounted(values.uncounted));
  if (!values.size_known) parts.push(words.unknown(values));
  return parts.join(locale.startsWith("zh") ? "；" : "; ");
}

async function ask() {
  let prompt;
  try {
    prompt = (await app.graphToPrompt()).output;
  } catch {
    return; // a graph that cannot be run yet has no plan
  }
  if (!Object.values(prompt).some((node) => node.class_type === LOADER)) return;
  const body = JSON.stringify({ prompt });
  if (body === asked) return;
  asked = body;
  const headers = { "Content-Type": "application/json" };
  const answer = await api.fetchApi("/qwen_lowvram/plan", { method: "POST", headers, body });
  if (!answer.ok || body !== asked) return; // an older server, or a newer question
  for (const line of (await answer.json()).lines)
    for (const id of line.nodes) for (const listener of listeners) listener(id, { text: textOf(line), fits: line.fits });
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(() => ask().catch(() => (asked = "")), WAIT_MS);
}

app.registerExtension({
  name: "qwenLowVRAM.planLines",

  setup() {
    api.addEventListener("graphChanged", soon);
    // a run frees and fills memory, and measures the machine
    for (const end of ["execution_success", "execution_error", "execution_interrupted"])
      api.addEventListener(end, () => {
        asked = "";
        soon();
      });
  },

  afterConfigureGraph: soon,

  nodeCreated(node) {
    if (node.comfyClass === LOADER) soon();
  },
});
