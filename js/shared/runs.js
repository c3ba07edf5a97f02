// Which of the server's events belong to the graph that the page shows: each prompt knows the id of its graph, and of
// several tabs with the same graph the one that queued it. And how the last run of each came to no good end.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const MOST = 200; // prompts that are remembered
const prompts = new Map(); // a prompt's id -> {graph, tab}
const queued = []; // {graph, tab} of prompts that no event was seen of, in their order
let remaining = 0; // prompts that the server has yet to run

const tabs = () => app.extensionManager?.workflow;
const shownTab = () => tabs()?.activeWorkflow?.path;
const isOpen = (tab) => (tabs()?.openWorkflows ?? []).some((workflow) => workflow.path === tab);

api.addEventListener("status", ({ detail }) => {
  remaining = detail?.exec_info?.queue_remaining ?? remaining;
});
api.addEventListener("promptQueueing", ({ detail }) => {
  if (!remaining) queued.length = 0; // what is left was refused, or had nothing of ours to run
  const each = { graph: app.rootGraph.id, tab: shownTab() };
  for (let count = Math.min(MOST, detail?.batchCount ?? 1); count > 0; count--) queued.push(each);
});

function remember(prompt, graph) {
  const place = queued.findIndex((each) => each.graph === graph);
  const [{ tab } = {}] = place < 0 ? [] : queued.splice(place, 1);
  if (prompts.size >= MOST) prompts.delete(prompts.keys().next().value);
  prompts.set(prompt, { graph, tab });
  forgetEnd({ graph, tab }); // a newer run has begun
}

const isShown = ({ graph, tab }) => graph === app.rootGraph.id && (!tab || tab === shownTab() || !isOpen(tab));

/** Whether the graph that is shown is the event's. One of a prompt that nothing is known of may be. */
export function isOfThisGraph({ prompt_id: prompt, workflow_id: graph }) {
  if (prompt && graph && !prompts.has(prompt)) remember(prompt, graph);
  const known = prompts.get(prompt);
  return !known || isShown(known);
}

/** Every node of the graph, those inside of subgraphs too. */
export function* allNodes(graph = app.rootGraph) {
  for (const node of graph?.nodes ?? []) {
    yield node;
    if (node.subgraph) yield* allNodes(node.subgraph);
  }
}

const errors = new Map(); // a prompt's id -> the last error of ours that the server told of, with its node
api.addEventListener("qwen_lowvram.error", ({ detail }) => {
  if (errors.size >= MOST) errors.delete(errors.keys().next().value);
  errors.set(detail.prompt_id, detail);
});

/** Of an execution_error: as the server told it with a code and values; else with ComfyUI's own text alone. */
export function errorOf({ prompt_id: prompt, node_id: node, exception_message: text }) {
  const told = errors.get(prompt);
  return told && String(told.node) === String(node) ? told : { code: "", values: {}, text: (text ?? "").trim() };
}

const ends = []; // {graph, tab, kind, event} of runs that came to no good end: of each tab the last one's
const endListeners = [];
for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
  api.addEventListener(kind, ({ detail }) => {
    const known = prompts.get(detail?.prompt_id);
    if (!known) return;
    forgetEnd(known);
    if (kind !== "execution_success") ends.push({ ...known, kind, event: detail });
  });

function forgetEnd({ graph, tab }) {
  const place = ends.findIndex((end) => end.graph === graph && end.tab === tab);
  if (place >= 0) ends.splice(place, 1);
}

/** Call `listener(kind, event)` when the page shows a graph again, whose nodes are new ones then, with how its last run
 *  ended, if not well. */
export const onEndAgain = (listener) => endListeners.push(listener);

app.registerExtension({
  name: "qwenLowVRAM.runs",

  afterConfigureGraph() {
    const end = ends.findLast(isShown);
    if (end) for (const listener of endListeners) listener(end.kind, end.event);
  },
});
