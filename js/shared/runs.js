// Which of the server's events belong to the graph that the page shows: each prompt knows the id of its graph.
import { app } from "../../../scripts/app.js";

const MOST_PROMPTS = 200;
const graphs = new Map(); // a prompt's id -> its graph's

/** Whether the graph that is shown is the event's. One of a prompt that nothing is known of may be. */
export function isOfThisGraph({ prompt_id: prompt, workflow_id: graph }) {
  if (prompt && graph && !graphs.has(prompt)) {
    if (graphs.size >= MOST_PROMPTS) graphs.delete(graphs.keys().next().value);
    graphs.set(prompt, graph);
  }
  const known = graph ?? graphs.get(prompt);
  return !known || known === app.rootGraph.id;
}

/** Every node of the graph, those inside of subgraphs too. */
export function* allNodes(graph = app.rootGraph) {
  for (const node of graph?.nodes ?? []) {
    yield node;
    if (node.subgraph) yield* allNodes(node.subgraph);
  }
}
