// The titles of groups, notes and subgraphs of this pack's workflows in the page's language, as a graph is opened. Changes
// no value.
import { app } from "../../../scripts/app.js";
import { words } from "./panels.js";
import { isChinese } from "./run_words.js";
import { retitle } from "./title_words.js";

app.registerExtension({
  name: "qwenLowVRAM.titles",
  beforeConfigureGraph: (graph) => retitle(graph, isChinese(words())),
});
