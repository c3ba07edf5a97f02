// The words of the model check, in the page's language. Touches no page.

const EN = {
  title: "Model check",
  none: "This pack found no model files in this graph. Add the low-VRAM loader, and choose its files.",
  asking: "Looking at the files…",
  failed: (why) => `The server did not answer: ${why}`,
  summary: (here, of) => (here === of ? `All ${of} files are here.` : `${here} of ${of} files are here.`),
  states: { here: "here", wrong: "not usable", missing: "missing" },
  belongs: (folder) => `belongs in models/${folder}`,
  sizeUnknown: "size not known",
  sources: { hub: "Hugging Face", mirror: "mirror" },
  link: (source) => `Open the link (${source})`,
  unknown: "Not in this pack's list: look where you found the graph.",
  download: (source) => `Download (${source})`,
  stop: "Stop",
  again: "Check again",
  running: (name, done, total, file) => `${name}: ${done} of ${total} GB${file}`,
  preparing: (name) => `${name}: contacting the server`,
  ofFiles: (file, files) => `, file ${file} of ${files}`,
  ended: {
    done: (name) => `${name} is here, complete.`,
    stopped: (name) => `${name}: stopped. What was downloaded is kept, and the next download continues from there.`,
    failed: (name, text) => `${name}: ${text}`,
  },
  nonCommercial: "for non-commercial use only (Qwen Research License)",
  hint: "Downloads start only by these buttons, one at a time. Sizes and revisions are those of the linked repositories.",
  close: "Close",
};

const ZH = {
  title: "模型检查",
  none: "此工作流中没有已知的模型文件。请添加低显存加载器并选择文件。",
  asking: "正在检查文件…",
  failed: (why) => `服务器没有回应：${why}`,
  summary: (here, of) => (here === of ? `${of} 个文件全部就绪。` : `${of} 个文件中已有 ${here} 个。`),
  states: { here: "已有", wrong: "不可用", missing: "缺少" },
  belongs: (folder) => `应放在 models/${folder}`,
  sizeUnknown: "大小未知",
  sources: { hub: "Hugging Face", mirror: "镜像" },
  link: (source) => `打开链接（${source}）`,
  unknown: "不在本节点包的列表中：请到工作流的来源处查找。",
  download: (source) => `下载（${source}）`,
  stop: "停止",
  again: "重新检查",
  running: (name, done, total, file) => `${name}：${done} / ${total} GB${file}`,
  preparing: (name) => `${name}：正在连接下载源`,
  ofFiles: (file, files) => `，第 ${file}/${files} 个文件`,
  ended: {
    done: (name) => `${name} 已完整下载。`,
    stopped: (name) => `${name}：已停止。已下载的部分会保留，下次从中断处继续。`,
    failed: (name, text) => `${name}：${text}`,
  },
  nonCommercial: "仅限非商业用途（Qwen Research License）",
  hint: "只有按下这些按钮才会下载，一次一个。大小和版本以链接的模型仓库为准。",
  close: "关闭",
};

/** The words, and in which order sources are offered: a Chinese page shows the mirror first. */
export const modelWords = (chinese) => (chinese ? { ...ZH, order: ["mirror", "hub"] } : { ...EN, order: ["hub", "mirror"] });

const gb = (bytes) => (bytes / 1e9).toFixed(2);

/** What is told of a download; `textOf` gives an error in the page's language. */
export function downloadLine(words, { name, state, file, files, done_bytes, total_bytes, text, values }, textOf) {
  if (state !== "running") return words.ended[state](name, state === "failed" ? (values ? textOf(values) : text) : "");
  if (!total_bytes) return words.preparing(name);
  return words.running(name, gb(done_bytes), gb(total_bytes), files > 1 ? words.ofFiles(file, files) : "");
}
