// What the graph's next run would take, asked of the server while a person changes the graph. Changes no value.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { messageOf } from "./error_words.js";
import { post, words } from "./panels.js";
import { expectationOf, isChinese } from "./run_words.js";

const LOADER = "QwenLowVRAMLoader";
export const TOO_LARGE = "var(--error-text, #e05252)"; // the colour of a line that says so
const WAIT_MS = 400; // after the last change

const listeners = [];
let marked = []; // ids of the nodes that the last lines found wrong
let timer;
let asked = "";

/** Call `listener(id, {text, fits})` with each line as it comes, by the ids of the nodes that it is for: the loader, the
 *  sampler, and where another node is wrong that one, with null as soon as it is not wrong any more. */
export function onPlanLine(listener) {
  listeners.push(listener);
}

/** The line in the page's language, as far as an error's text is there in it. */
function textOf({ fits, text, values }) {
  const said = words();
  if (fits) {
    const doubts = (values.doubts ?? []).map((doubt) => messageOf(isChinese(said), doubt)); // older servers have none
    return [expectationOf(said, values), ...doubts].join("\n");
  }
  return (values.code ? messageOf(isChinese(said), values) : text).replace(/\n\n+/g, "\n");
}

async function linesOf(prompt) {
  const answer = await post("/qwen_lowvram/plan", { prompt });
  if (!answer.ok) throw new Error(`The server answers ${answer.status}.`);
  return (await answer.json()).lines;
}

async function ask() {
  let prompt;
  try {
    prompt = (await app.graphToPrompt()).output;
  } catch {
    return; // a graph that cannot be run yet has no plan
  }
  const tell = (id, line) => listeners.forEach((listener) => listener(id, line));
  if (!Object.values(prompt).some((node) => node.class_type === LOADER)) {
    marked.splice(0).forEach((id) => tell(id, null));
    asked = "";
    return;
  }
  const question = JSON.stringify(prompt);
  if (question === asked) return;
  asked = question;
  const lines = await linesOf(prompt).catch(() => null);
  if (question !== asked) return; // there is a newer one
  if (!lines) {
    asked = ""; // the next change asks again
    return;
  }
  marked.forEach((id) => tell(id, null));
  const wrongAt = ({ fits, values }) => (fits ? [] : [values.values?.at].filter(Boolean));
  marked = lines.flatMap(wrongAt);
  for (const line of lines)
    for (const id of [...line.nodes, ...wrongAt(line)]) tell(id, { text: textOf(line), fits: line.fits });
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(ask, WAIT_MS);
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
