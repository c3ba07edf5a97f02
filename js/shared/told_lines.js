// What a node tells while it runs, in Chinese on such a page: ComfyUI has shown it in English. Changes no value.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { toldInChinese } from "./error_words.js";
import { nodeAt, words } from "./panels.js";
import { isChinese } from "./run_words.js";
import { isOfThisGraph } from "./runs.js";

const EVENT = "qwen_lowvram.told";
const SHOWN = "$$node-text-preview"; // what the page calls the widget of such texts, which are HTML

const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

async function show(event) {
  const node = isOfThisGraph(event) && isChinese(words()) && nodeAt(event.node);
  const widget = node && node.widgets?.find(({ name }) => name === SHOWN);
  if (!widget) return;
  const english = widget.value;
  const told = await toldInChinese(event.parts, "");
  if (told && widget.value === english) widget.value = escaped(told); // else it tells something newer
}

app.registerExtension({
  name: "qwenLowVRAM.toldLines",
  setup: () => api.addEventListener(EVENT, ({ detail }) => show(detail)),
});
