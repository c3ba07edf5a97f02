// What the graph's next run would take, asked of the server while a person changes the graph. Changes no value.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { messageOf } from "./error_words.js";
import { post, words } from "./panels.js";
import { expectationOf, isChinese } from "./run_words.js";

const LOADER = "QwenLowVRAMLoader";
const WAIT_MS = 400; // after the last change

const listeners = [];
let told = []; // ids of the nodes that the last lines are on
let timer;
let asked = "";

/** Call `listener(id, {text, fits})` with each line as it comes, by the ids of the nodes that it is for: the loader, the
 *  sampler, and where another node is wrong that one; with null as soon as nothing is said of a node any more. */
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

function show(lines) {
  const wrongAt = ({ fits, values }) => (fits ? [] : [values.values?.at].filter(Boolean));
  const now = lines.flatMap((line) => [...line.nodes, ...wrongAt(line)].map((id) => [id, line]));
  const tell = (id, line) => listeners.forEach((listener) => listener(id, line));
  const gone = told.filter((id) => !now.some(([other]) => other === id));
  told = now.map(([id]) => id);
  for (const id of gone) tell(id, null);
  for (const [id, line] of now) tell(id, { text: textOf(line), fits: line.fits });
}

async function ask() {
  let prompt;
  try {
    prompt = (await app.graphToPrompt()).output;
  } catch {
    return; // a graph that cannot be run yet has no plan
  }
  if (!Object.values(prompt).some((node) => node.class_type === LOADER)) {
    asked = "";
    show([]);
    return;
  }
  const question = JSON.stringify(prompt);
  if (question === asked) return;
  asked = question;
  const lines = await linesOf(prompt).catch(() => null); // the server is away, or an older one
  if (question !== asked) return; // a newer question is on its way
  if (!lines) asked = ""; // the next change asks again
  show(lines ?? []);
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(ask, WAIT_MS);
}

/** The same question, too: its answer may be another one now, or the nodes are new and say nothing yet. */
function again() {
  asked = "";
  soon();
}

app.registerExtension({
  name: "qwenLowVRAM.planLines",

  setup() {
    api.addEventListener("graphChanged", soon);
    // a run frees and fills memory, and measures the machine; a server that comes back may be another one
    for (const kind of ["execution_success", "execution_error", "execution_interrupted", "reconnected"])
      api.addEventListener(kind, again);
  },

  afterConfigureGraph: again, // of an undone change, which may be one of places alone, too

  refreshComboInNodes: again, // files may have come

  nodeCreated(node) {
    if (node.comfyClass === LOADER) soon();
  },
});
