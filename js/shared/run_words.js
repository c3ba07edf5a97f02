// What a run does in the words of a person, in the page's language: of the server's events and reports. Touches no page.
import { chineseSentence } from "./error_words.js";

const EN = {
  idle: "Nothing has run yet",
  memory: { vram: "VRAM", ram: "RAM" },
  progress: "Progress",
  details: "Details",
  detailsHint: "The whole plan and report",
  opening: "Opening the model's files",
  quantizing: "Quantizing",
  encoding: "Encoding prompts",
  encoding_image: "Encoding an image",
  decoding: "Decoding",
  measuring: "Measuring this machine",
  preparing: "Preparing",
  loading: "Loading what stays on the card",
  modulation: "Reading weights once (not for the next seed)",
  parts: {
    quantizing: "block", encoding: "layer", encoding_image: "tile", decoding: "tile", loading: "block",
    modulation: "block", measuring: "part",
  },
  counted: (what, part, at, of) => `${what}${part === "block" && what.endsWith(")") ? ":" : ","} ${part} ${at}/${of}`,
  ended: {
    opening: (time) => `Model opened in ${time}`,
    quantizing: (time) => `Quantized in ${time}`,
    encoding: (time) => `Prompts encoded in ${time}`,
    encoding_image: (time) => `Image encoded in ${time}`,
    decoding: (time) => `Decoded in ${time}`,
    measuring: (time) => `Measured in ${time}`,
  },
  step: (step, steps, time, left) => `step ${step}/${steps} · ${time} · about ${left} left`,
  done: (steps, time) => `Done: ${steps} steps in ${time}`,
  stopped: { interrupted: "Interrupted", failed: "Failed" },
  after: (word, step, steps, time) => `${word} after ${step} of ${steps} steps · ${time}`,
  waits: (what) => `Waiting: ${what[0].toLowerCase()}${what.slice(1)}`,
  pace: (seconds) => `${seconds} s/step`,
  forecast: (seconds) => `about ${seconds} s/step`,
  numbers: (now, peak, of) => `${now}, peak ${peak}${of ? ` of ${of}` : ""} GiB`,
  ofLimit: (now, limit) => `${now} of ${limit} GiB for the model`,
  noVram: "none of its own: the device uses RAM",
  bound: { compute: "computing", bus: "the bus", disk: "the disk", decoding: "decoding", link: "the link" },
  boundBy: (bound) => `bound by ${bound}`,
  expected: (format, at, of, memory, limit, pace, measured) =>
    `${format}, ${at} of ${of} blocks on the card, ${memory} of ${limit} GiB, about ${pace} s/step ` +
    (measured ? "on this machine" : "on a typical card"),
  together: (cards) => ` with ${cards} cards`,
  notCounted: (names) => `${names.join(", ")} not counted`,
  sizeUnknown: (width, height) => `planned for ${width}x${height}: the size is not known before the run`,
  all: (blocks, host) => `All ${blocks} blocks stay ${host ? "in RAM" : "on the card"}`,
  some: (resident, blocks, host) =>
    `${resident || "None"} of ${blocks} blocks ${resident === 1 ? "stays" : "stay"} ${host ? "in RAM" : "on the card"}`,
  others: (resident) => `${resident ? "the rest" : "they"} pass through once per step`,
  told: (name, text) => text,
  oneByOne: (reason) => `One prompt after another: ${reason}`,
  read: (gib, resident, blocks) => `${gib} GiB read from the file. ${resident} of ${blocks} blocks stay for the next run.`,
  previewsOff: "Live previews are off.",
  switchPreviews: "Switch on from the next run",
  previewsOn: "On from the next run.",
  error: "What went wrong",
  title: "Plan and report of the last run",
  running: "Plan of this run",
  copy: "Copy text",
  copied: "Copied",
  selected: "Press Ctrl+C",
  close: "Close",
  asLogged: "As in the log",
  rows: {
    image: "Image", computed: "Computed per step", resident: "Blocks that stay on the card",
    residentHost: "Blocks that stay in RAM", plannedOn: (device) => `Memory of ${device}, planned`,
    measuredOn: (device) => `Memory of ${device}, measured`, held: "Blocks held in RAM", file: "Blocks read from the file in every step",
    streamed: "Passes through the card per step", planned: "Card memory, planned", measured: "Card memory, measured",
    ram: "RAM for the model, planned", process: "RAM of ComfyUI, peak", step: "A step", bound: "Bound by",
    first: "The whole run, first time", again: "The whole run, another seed", attention: "Attention", note: "Note",
    reason: "One prompt after another",
  },
  branches: (count) => `${count} (prompts times images)`,
  ofLimitLong: (value, limit) => `${value} of ${limit}`,
  parted: (total, weights, rest) => `${total}: weights ${weights}, computing ${rest}`,
  forecastOnly: (forecast) => `${forecast} s (forecast)`,
  measuredToo: (measured, forecast) => `${measured} s (forecast ${forecast} s)`,
};

const ZH = {
  idle: "尚未运行",
  memory: { vram: "显存", ram: "内存" },
  progress: "进度",
  details: "详情",
  detailsHint: "完整的计划和报告",
  opening: "正在打开模型文件",
  quantizing: "正在量化",
  encoding: "正在编码提示词",
  encoding_image: "正在编码图像",
  decoding: "正在解码",
  measuring: "正在测量本机",
  preparing: "正在准备",
  loading: "正在加载常驻显卡的块",
  modulation: "正在读取调制权重（换种子时不再读取）",
  parts: {
    quantizing: "块", encoding: "层", encoding_image: "分块", decoding: "分块", loading: "块", modulation: "块",
    measuring: "项",
  },
  counted: (what, part, at, of) => `${what}：第 ${at}/${of} ${part}`,
  ended: {
    opening: (time) => `模型已打开，用时 ${time}`,
    quantizing: (time) => `量化完成，用时 ${time}`,
    encoding: (time) => `提示词编码完成，用时 ${time}`,
    encoding_image: (time) => `图像编码完成，用时 ${time}`,
    decoding: (time) => `解码完成，用时 ${time}`,
    measuring: (time) => `测量完成，用时 ${time}`,
  },
  step: (step, steps, time, left) => `第 ${step}/${steps} 步 · ${time} · 约剩 ${left}`,
  done: (steps, time) => `完成：${steps} 步，用时 ${time}`,
  stopped: { interrupted: "已中断", failed: "失败" },
  after: (word, step, steps, time) => `${word}：完成了 ${steps} 步中的 ${step} 步 · ${time}`,
  waits: (what) => `等待中：${what}`,
  pace: (seconds) => `${seconds} 秒/步`,
  forecast: (seconds) => `约 ${seconds} 秒/步`,
  numbers: (now, peak, of) => `${now}，峰值 ${peak}${of ? ` / ${of}` : ""} GiB`,
  ofLimit: (now, limit) => `模型占用 ${now} / ${limit} GiB`,
  noVram: "没有独立显存：设备使用内存",
  bound: { compute: "计算", bus: "总线", disk: "硬盘", decoding: "解码", link: "显卡间连接" },
  boundBy: (bound) => `瓶颈：${bound}`,
  expected: (format, at, of, memory, limit, pace, measured) =>
    `${format}，显卡上常驻 ${at}/${of} 块，显存 ${memory}/${limit} GiB，${measured ? "本机" : "典型显卡"}每步约 ${pace} 秒`,
  together: (cards) => `（共 ${cards} 张显卡）`,
  notCounted: (names) => `未计入 ${names.join("、")}`,
  sizeUnknown: (width, height) => `按 ${width}x${height} 计划：运行之前还不知道尺寸`,
  all: (blocks, host) => `全部 ${blocks} 个块常驻${host ? "内存" : "显卡"}`,
  some: (resident, blocks, host) => `${blocks} 个块中 ${resident} 个常驻${host ? "内存" : "显卡"}`,
  others: (resident) => `${resident ? "其余的块" : "所有块"}每步传入一次`,
  told: chineseSentence,
  oneByOne: (reason) => `提示词逐个计算：${chineseSentence("one_by_one", reason)}`,
  read: (gib, resident, blocks) => `从文件读取了 ${gib} GiB。${blocks} 个块中 ${resident} 个留给下次运行。`,
  previewsOff: "实时预览已关闭。",
  switchPreviews: "从下次运行起开启",
  previewsOn: "下次运行起生效。",
  error: "出错原因",
  title: "上次运行的计划和报告",
  running: "本次运行的计划",
  copy: "复制文本",
  copied: "已复制",
  selected: "请按 Ctrl+C",
  close: "关闭",
  asLogged: "与日志相同的文本",
  rows: {
    image: "图像", computed: "每步计算", resident: "常驻显卡的块", residentHost: "常驻内存的块", plannedOn: (device) => `${device} 显存（计划）`,
    measuredOn: (device) => `${device} 显存（实测）`, held: "保留在内存中的块",
    file: "每步从文件读取的块", streamed: "每步传入显卡的数据", planned: "显存（计划）", measured: "显存（实测）",
    ram: "模型占用内存（计划）", process: "ComfyUI 占用内存（最高）", step: "每步", bound: "瓶颈", first: "整次运行（首次）",
    again: "整次运行（换种子）", attention: "注意力", note: "说明", reason: "提示词逐个计算",
  },
  branches: (count) => `${count}（提示词数 × 图像数）`,
  ofLimitLong: (value, limit) => `${value} / ${limit}`,
  parted: (total, weights, rest) => `${total}：权重 ${weights}，计算 ${rest}`,
  forecastOnly: (forecast) => `${forecast} 秒（预测）`,
  measuredToo: (measured, forecast) => `${measured} 秒（预测 ${forecast} 秒）`,
};

export const isChinese = (words) => words === ZH;

/** The words of a locale, as the page names it. */
export const wordsOf = (locale) => (String(locale).startsWith("zh") ? ZH : EN);

export const gib = (bytes) => (bytes / 2 ** 30).toFixed(2);

/** 1:12, or 2:03:45. */
export function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

/** Seconds of a step: two digits that count. */
export const paceOf = (seconds) => (seconds < 10 ? seconds.toFixed(seconds < 1 ? 2 : 1) : seconds.toFixed(0));

/** What an event says, in a line. */
export function lineOf(words, event) {
  const { stage, step, steps, seconds, done, total } = event;
  if (stage === "sampling") return words.step(step, steps, clock(seconds), clock(event.seconds_left));
  if (stage === "done") return words.done(steps, clock(seconds));
  if (stage === "stopped") return words.after(words.stopped.interrupted, step, steps, clock(seconds));
  if (total && done >= total && words.ended[stage]) return words.ended[stage](clock(seconds));
  if (!total || !words.parts[stage]) return words[stage] ?? "";
  return words.counted(words[stage], words.parts[stage], Math.min(done + 1, total), total);
}

/** Where the blocks are and what a step waits for, in a sentence. */
export function sentenceOf(words, facts) {
  if (facts.one_by_one) return words.oneByOne(facts.one_by_one);
  const { resident, elsewhere, blocks, host } = facts;
  const bound = words.boundBy(words.bound[facts.bound] ?? facts.bound);
  const there = resident + elsewhere;
  const where = there === blocks ? [words.all(blocks, host)] : [words.some(there, blocks, host), words.others(there)];
  const [comma, semicolon, end] = words === ZH ? ["，", "；", "。"] : [", ", "; ", "."];
  return `${where.join(comma)}${semicolon}${bound}${end}`;
}

/** What a run would take that has not begun, in a line: a plan's facts, and what is not known of it yet. */
export function expectationOf(words, facts) {
  const { format, resident, elsewhere, blocks, peak_bytes: peak, limit_bytes: limit } = facts;
  const pace = paceOf(facts.seconds_per_step);
  const [comma, semicolon] = words === ZH ? ["，", "；"] : [", ", "; "];
  let line = words.expected(format, resident + elsewhere, blocks, gib(peak), gib(limit), pace, facts.measured);
  if (facts.further.length) line += words.together(facts.further.length + 1);
  const parts = [line + comma + words.boundBy(words.bound[facts.bound] ?? facts.bound)];
  if (facts.uncounted.length) parts.push(words.notCounted(facts.uncounted));
  if (!facts.size_known) parts.push(words.sizeUnknown(facts.width, facts.height));
  return parts.join(semicolon);
}

/** [name, value] of what a plan says, and a report where there is one. */
export function rowsOf(words, facts, report) {
  const { rows } = words;
  const size = (bytes) => `${gib(bytes)} GiB`;
  const limited = (bytes, limit) => (limit ? words.ofLimitLong(size(bytes), size(limit)) : size(bytes));
  const of = (count) => words.ofLimitLong(count, facts.blocks);
  const passes = report?.passes;
  const forecast = paceOf(facts.seconds_per_step);
  const planned = words.parted(
    limited(facts.peak_bytes, facts.limit_bytes), size(facts.weights_bytes), size(facts.activation_bytes));
  return [
    [rows.image, `${facts.width}x${facts.height} px`],
    [rows.computed, words.branches(facts.branches)],
    [facts.host ? rows.residentHost : rows.resident, of(facts.resident + facts.elsewhere)],
    ...(facts.held ? [[rows.held, of(facts.held)]] : []),
    ...(facts.from_file ? [[rows.file, of(facts.from_file)], [rows.streamed, size(facts.streamed_bytes)]] : []),
    [rows.planned, planned],
    ...(report?.peak_vram_bytes ? [[rows.measured, size(report.peak_vram_bytes)]] : []),
    ...facts.further.flatMap((card, index) => [
      [rows.plannedOn(card.device), limited(card.peak_bytes, card.limit_bytes)],
      ...(report?.further_peaks_bytes[index] ? [[rows.measuredOn(card.device), size(report.further_peaks_bytes[index])]] : []),
    ]),
    [rows.ram, limited(facts.ram_peak_bytes, facts.ram_limit_bytes)],
    ...(report ? [[rows.process, size(report.peak_ram_bytes)]] : []),
    [rows.step, passes ? words.measuredToo(paceOf(report.pass_seconds / passes), forecast) : words.forecastOnly(forecast)],
    [rows.bound, words.bound[facts.bound] ?? facts.bound],
    [rows.first, words.forecastOnly(facts.first_seconds.toFixed(0))],
    [rows.again, words.forecastOnly(facts.again_seconds.toFixed(0))],
    ...(facts.attention ? [[rows.attention, facts.attention]] : []),
    ...(facts.one_by_one ? [[rows.reason, words.told("one_by_one", facts.one_by_one)]] : []),
    ...(facts.advice ? [[rows.note, words.told("advice", facts.advice)]] : []),
  ];
}
