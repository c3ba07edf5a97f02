// The titles of groups, notes and subgraphs of this pack's workflows in the page's language, as a graph is opened. Changes
// no value.
import { app } from "../../scripts/app.js";
import { words } from "./shared/panels.js";
import { isChinese } from "./shared/run_words.js";
import { retitle } from "./shared/title_words.js";

app.registerExtension({
  name: "qwenLowVRAM.titles",
  beforeConfigureGraph: (graph) => retitle(graph, isChinese(words())),
});
