// The page's command "Use the low-VRAM loader in this graph": one step that one undo takes back. Says what it did.
import { app } from "../../../scripts/app.js";
import { isChinese } from "../shared/run_words.js";
import { post, words } from "../shared/panels.js";
import { familyByName, namedFiles, swapLoaders } from "./loader_swap.js";

const LOADER = "QwenLowVRAMLoader";
const ID = "qwenLowVRAM.useLoader";
const MENU = "Qwen-Image (low VRAM)";
const SHOWN_MS = 15000;
const SHOWN_LINES = 6;

const WORDS = {
  en: {
    done: (count) => `${count} low-VRAM ${count === 1 ? "loader is" : "loaders are"} now in the graph`,
    undo: "Undo brings the old loaders back.",
    none: "No loader was replaced",
    nothing: "No loader of ComfyUI's in this graph (Load Diffusion Model, or its GGUF version) opens a Qwen-Image model.",
    replaced: ({ transformer, text_encoder, vae }) => `Replaced: ${transformer}, ${text_encoder}, ${vae}`,
    quantized: "weight_dtype fp8 became weight_format fp8: a bf16 file is quantized once, and the result is kept on disk.",
    left: {
      unknown: (name) =>
        `Left alone: ${name}. The file is not on this machine, and its name does not say that it is a Qwen-Image model. If it is one, choose it in the ` +
        "low-VRAM loader yourself.",
      alone: (name) => `Left alone: ${name}. No text encoder and VAE of Qwen-Image were found that belong to it.`,
      linked: (name) => `Left alone: ${name}. A setting of its loaders comes from another node.`,
      kept: (name) => `Its old loader stays, because other nodes use it: ${name}`,
      other: (name) => `Belongs to another model: ${name}`,
    },
    inside: (graph) => ` (in ${graph})`,
    more: (count) => `and ${count} more`,
  },
  zh: {
    done: (count) => `已在此工作流中换上 ${count} 个低显存加载器`,
    undo: "撤销即可恢复原来的加载器。",
    none: "没有替换任何加载器",
    nothing: "此工作流中没有用 ComfyUI 自带加载器（UNet加载器，或其 GGUF 版）打开的 Qwen-Image 模型。",
    replaced: ({ transformer, text_encoder, vae }) => `已替换：${transformer}、${text_encoder}、${vae}`,
    quantized: "数据类型（weight_dtype）fp8 已改为权重格式（weight_format）fp8：bf16 文件只量化一次，结果保存在硬盘上。",
    left: {
      unknown: (name) =>
        `未改动：${name}。文件不在本机，从文件名也看不出它是 Qwen-Image 模型；如果是，请在低显存加载器中自行选择它。`,
      alone: (name) => `未改动：${name}。没有找到属于它的 Qwen-Image 文本编码器和 VAE。`,
      linked: (name) => `未改动：${name}。它的加载器有设置由其他节点输入。`,
      kept: (name) => `原来的加载器保留，因为还有其他节点依赖它：${name}`,
      other: (name) => `其他模型的：${name}`,
    },
    inside: (graph) => `（在“${graph}”中）`,
    more: (count) => `另有 ${count} 项`,
  },
};

/** Names, types and defaults of our loader's inputs that have a widget, in their order. */
function loaderInputs() {
  const { required, optional } = globalThis.LiteGraph.registered_node_types[LOADER].nodeData.input;
  return Object.entries({ ...required, ...optional }).map(([name, [type, options]]) => {
    const choices = Array.isArray(type) ? type : options?.options;
    return { name, type: choices ? "COMBO" : type, value: options?.default ?? choices?.[0] };
  });
}

/** Whose files they are: what their headers say, of those that are here; else what their names say. */
async function familiesOf(files) {
  const answer = await post("/qwen_lowvram/families", { files });
  const { families = [] } = await answer.json();
  const read = new Map(files.map((file, index) => [file.join("/"), families[index]]));
  return (folder, name) => read.get(`${folder}/${name}`) || familyByName(folder, name);
}

function linesOf({ replaced, left }, said) {
  const where = ({ graph }) => (graph ? said.inside(graph) : "");
  const told = replaced.map((each) => said.replaced(each) + where(each));
  if (replaced.some((each) => each.quantized)) told.push(said.quantized);
  const meant = left.filter(({ why }) => why !== "other");
  if (!replaced.length && !meant.length) told.push(said.nothing, ...left.map(({ name, why }) => said.left[why](name)));
  for (const each of meant) told.push(said.left[each.why](each.name) + where(each));
  const lines = [...new Set(told)];
  const shown = lines.length > SHOWN_LINES ? [...lines.slice(0, SHOWN_LINES), said.more(lines.length - SHOWN_LINES)] : lines;
  return replaced.length ? [...shown, said.undo] : shown;
}

async function useLoader() {
  const said = WORDS[isChinese(words()) ? "zh" : "en"];
  const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker;
  tracker.captureCanvasState(); // what was changed until now is a step of its own
  const graph = app.rootGraph.serialize();
  const swapped = swapLoaders(graph, loaderInputs(), await familiesOf(namedFiles(graph)));
  const done = swapped.replaced.length > 0;
  if (done) {
    await tracker.updateState([swapped.workflow], tracker.undoQueue); // as undo and redo set a graph
    tracker.redoQueue.length = 0;
    tracker.activeState = structuredClone(app.rootGraph.serialize()); // as the page writes it: no step is left to see
  }
  app.extensionManager.toast.add({
    severity: done ? "success" : "info",
    summary: done ? said.done(swapped.replaced.length) : said.none,
    detail: linesOf(swapped, said).join("\n"),
    life: SHOWN_MS,
  });
  return swapped;
}

app.registerExtension({
  name: "qwenLowVRAM.useLoader",
  commands: [{ id: ID, label: "Use the low-VRAM loader in this graph", icon: "pi pi-replay", function: useLoader }],
  menuCommands: [{ path: [MENU], commands: [ID] }],
});
