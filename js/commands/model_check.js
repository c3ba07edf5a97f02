// The page's command "Model check": the files that the graph needs, which are here, and where the others come from.
// A download begins only where a person presses its button.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { messageOf } from "../shared/error_words.js";
import { BUTTON, make, makeView } from "../shared/full_view.js";
import { downloadLine, modelWords } from "../shared/model_words.js";
import { isChinese } from "../shared/run_words.js";
import { ERROR_COLOR, post, words } from "../shared/panels.js";

export const MODEL_CHECK = "qwenLowVRAM.modelCheck";
const MENU = "Qwen-Image (low VRAM)";
const EVENT = "qwen_lowvram.download";
const LINE = "white-space:pre-line;overflow-wrap:anywhere;user-select:text";
const COLORS = { here: "color-mix(in srgb, #4caf50 50%, var(--input-text))", wrong: ERROR_COLOR, missing: ERROR_COLOR };

let open = null; // the window, while it is open: {view, list, progress, said, running: parts that show a download}

async function asked(path, body) {
  const answer = await post(path, body);
  const given = await answer.json();
  if (!answer.ok) throw new Error(given.values ? textOf(given.values) : given.error);
  return given;
}

const textOf = (error) => messageOf(isChinese(words()), error);

function link(url, text) {
  const element = make("a", "color:var(--p-primary-color, #4a90d9);overflow-wrap:anywhere", text);
  Object.assign(element, { href: url, target: "_blank", rel: "noopener noreferrer", title: url });
  return element;
}

function button(text, press, css = "") {
  const element = make("button", BUTTON + css, text);
  element.type = "button";
  element.addEventListener("click", press);
  return element;
}

function row(said, file) {
  const item = make("li", "margin:0 0 12px;padding:0 0 12px;border-bottom:1px solid var(--border-color)");
  item.dataset.state = file.state;
  const head = make("div", "display:flex;gap:8px;flex-wrap:wrap;align-items:baseline");
  const facts = [said.belongs(file.folder), file.size || said.sizeUnknown];
  if (file.non_commercial) facts.push(said.nonCommercial);
  head.append(
    make("strong", `color:${COLORS[file.state]}`, `${file.state === "here" ? "✓" : "✗"} ${said.states[file.state]}`),
    make("span", "overflow-wrap:anywhere;user-select:text", file.name),
    make("span", "opacity:0.8", facts.join(" · ")),
  );
  item.append(head);
  if (file.state === "wrong") {
    const reason = file.values.code ? textOf(file.values) : file.text;
    item.append(make("div", "white-space:pre-line;overflow-wrap:anywhere;user-select:text", reason));
  }
  if (file.state === "here") return item;
  const links = said.order.flatMap((source) => file.links.filter((each) => each.source === source));
  const ways = make("div", "display:flex;gap:8px;flex-wrap:wrap;align-items:center;margin:4px 0 0");
  const isInSubfolder = /[\\/]/.test(file.name); // which a download does not fill
  for (const { source } of isInSubfolder ? [] : links) {
    const start = button(said.download(said.sources[source]), () => begin(file, source), ";padding:2px 10px");
    start.dataset.download = source;
    ways.append(start);
  }
  for (const { source, url } of links) ways.append(link(url, said.link(said.sources[source])));
  if (!links.length) ways.append(make("span", "opacity:0.8", said.unknown));
  item.append(ways);
  return item;
}

async function begin({ folder, name }, source) {
  try {
    await asked("/qwen_lowvram/download", { folder, name, source }); // events tell the rest, also before its answer
  } catch (error) {
    if (open) open.progress.textContent = error.message;
  }
}

function showDownload(download) {
  if (!open || !download) return;
  const { progress, said } = open;
  const text = downloadLine(said, download, textOf);
  progress.dataset.state = download.state;
  if (download.state !== "running") {
    open.running = null;
    progress.replaceChildren(make("div", LINE, text));
    return;
  }
  if (!open.running) progress.replaceChildren(...Object.values((open.running = makeRunning(said))));
  const { line, bar } = open.running;
  line.textContent = text;
  bar.setAttribute("aria-label", text);
  if (download.total_bytes) Object.assign(bar, { max: download.total_bytes, value: download.done_bytes });
}

/** Made once for a download: a button that is replaced four times a second can hardly be pressed. */
function makeRunning(said) {
  const line = make("div", LINE);
  line.setAttribute("aria-live", "off"); // the bar tells who asks for it
  const stop = button(said.stop, () => asked("/qwen_lowvram/download", { stop: true }));
  return { line, bar: make("progress", "width:100%"), stop };
}

async function look() {
  const { list, said } = open;
  const here = open;
  list.replaceChildren(make("li", "", said.asking));
  try {
    const { output } = await app.graphToPrompt();
    const { files, download } = await asked("/qwen_lowvram/models", { prompt: output });
    if (open !== here) return;
    const whole = files.filter(({ state }) => state === "here").length;
    const summary = make("li", "margin:0 0 12px", files.length ? said.summary(whole, files.length) : said.none);
    list.replaceChildren(summary, ...files.map((file) => row(said, file)));
    if (download?.state === "running") showDownload(download);
  } catch (error) {
    if (open === here) list.replaceChildren(make("li", "", said.failed(error.message)));
  }
}

async function openCheck() {
  open?.view.close();
  const said = modelWords(isChinese(words()));
  const view = makeView(said.title);
  const head = make("div", "display:flex;align-items:center;gap:8px;margin:0 0 12px");
  const close = button(said.close, () => view.close());
  head.append(make("h2", "flex:1;margin:0;font:600 16px/24px sans-serif", said.title), button(said.again, look), close);
  const progress = make("div", "margin:0 0 12px");
  progress.setAttribute("role", "status");
  const list = make("ul", "list-style:none;margin:0;padding:0");
  view.append(head, progress, list, make("p", "margin:0;opacity:0.8", said.hint));
  view.classList.add("qwen-lowvram-models");
  view.addEventListener("close", () => (open = null));
  document.body.append(view);
  open = { view, list, progress, said, running: null };
  view.showModal();
  close.focus();
  await look();
}

app.registerExtension({
  name: MODEL_CHECK,
  commands: [{ id: MODEL_CHECK, label: "Model check", icon: "pi pi-list-check", function: openCheck }],
  menuCommands: [{ path: [MENU], commands: [MODEL_CHECK] }],

  setup() {
    api.addEventListener(EVENT, async ({ detail }) => {
      showDownload(detail);
      if (detail.state !== "done") return;
      await app.refreshComboInNodes?.(); // so that the file can be chosen
      if (open) await look();
    });
  },
});
