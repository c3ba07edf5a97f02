// What the nodes' panels share. The page imports this file like every script; alone it does nothing.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { toldInChinese } from "./error_words.js";
import { isChinese, wordsOf } from "./run_words.js";
import { isOfThisGraph } from "./runs.js";

const MARGIN_PX = 10; // the page keeps it free on every side
const PADDING_PX = [6, 8]; // of a text in its panel, above and beside it
const BORDERS_PX = 8; // of a node's panels in the newer renderer, on both sides together

// of a text that says what is wrong: the page's own red is too pale on its light palettes
export const ERROR_COLOR = "color-mix(in srgb, var(--error-text, #e05252) 50%, var(--input-text))";

/** A node by its id as the server gives it: inside subgraphs "12:5", node 5 of node 12's graph. */
export function nodeAt(id) {
  let graph = app.rootGraph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

/** What a run is told in, in the page's language. */
export const words = () => wordsOf(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en");

/** The server's answer to that JSON. */
export const post = (path, body) =>
  api.fetchApi(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

function widthOf(line, font) {
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = font;
  return pen.measureText(line).width;
}

/** Put `element` on a node as a panel of at least that height, or of just that height if `fixed`. Returns a function that
 *  gives it another height; 0 takes no room at all. */
export function addPanel(node, element, { name, heightPx, widthPx, fixed = false }) {
  let present = heightPx;
  const height = () => present && present + 2 * MARGIN_PX;
  const limits = { margin: MARGIN_PX, getMinHeight: height, ...(fixed && { getMaxHeight: height }) };
  const widget = node.addDOMWidget(name, name, element, { serialize: false, ...limits });
  const least = node.computeSize()[1]; // the page does not let a node grow by itself
  node.setSize([Math.max(node.size[0], widthPx), Math.max(node.size[1], least)]); // a saved size comes later and wins
  widget.serialize = false; // neither in the prompt nor in the file, where it would take an input's place
  return (px) => {
    const before = height();
    present = px;
    if (height() === before) return;
    element.style.display = px ? "" : "none";
    node.setSize([node.size[0], node.size[1] + height() - before]);
    node.setDirtyCanvas?.(true, true);
  };
}

/** What a node tells, in the page's language: `text` in English, `parts` to make it of in another. */
export const tellText = async (text, parts) => (parts && isChinese(words()) ? toldInChinese(parts, text) : text);

/**
 * Register an extension that shows, on nodes of some classes, the text that their last run gave. `empty`: what is there
 * before it, in English and Chinese, by class. `chineseBelow`: what a Chinese page says below it, by class. `sentences`:
 * what its sentences are called where they are known in Chinese, and no parts come with them.
 * `linePx`: the node grows until all of a text is seen, whose lines are that high and do not wrap. `created`: called with
 * each new node. Returns (node, text) => void, which shows another text.
 */
export function showText({ extension, empty, sentences, chineseBelow, name, className, css, created, ...sizes }) {
  const { heightPx, widthPx, linePx } = sizes;
  const panels = new WeakMap(); // node -> its element, and what gives it another height: goes when its node goes

  function setText(node, text) {
    const { panel, setHeight } = panels.get(node) ?? {};
    if (!panel) return;
    panel.textContent = text;
    if (!linePx) return;
    const lines = text.split("\n");
    setHeight(Math.max(heightPx, lines.length * linePx + 2 * PADDING_PX[0]));
    const textPx = Math.max(...lines.map((line) => widthOf(line, getComputedStyle(panel).font)));
    const least = Math.ceil(textPx) + 2 * (PADDING_PX[1] + MARGIN_PX) + BORDERS_PX;
    if (node.size[0] < least) node.setSize([least, node.size[1]]);
  }

  async function show(id, output) {
    if (!output?.text) return;
    const text = output.text.join("\n");
    const node = nodeAt(id);
    const told = sentences ? words().told(sentences, text) : await tellText(text, output.parts);
    const below = told === text ? undefined : chineseBelow?.[node?.comfyClass];
    setText(node, below ? `${told}\n\n${below}` : told);
  }

  app.registerExtension({
    name: extension,

    setup() {
      api.addEventListener("executed", ({ detail }) => {
        if (isOfThisGraph(detail)) show(detail.display_node ?? detail.node, detail.output);
      });
    },

    nodeCreated(node) {
      if (!(node.comfyClass in empty)) return;
      const panel = document.createElement("div");
      panel.className = className;
      const [english, chinese] = empty[node.comfyClass];
      panel.textContent = isChinese(words()) ? chinese : english;
      panel.style.cssText =
        `box-sizing:border-box;width:100%;height:100%;min-height:${heightPx}px;` +
        `padding:${PADDING_PX.map((px) => `${px}px`).join(" ")};overflow:auto;` +
        `user-select:text;border-radius:4px;color:var(--input-text);background:var(--comfy-input-bg);${css}`;
      panels.set(node, { panel, setHeight: addPanel(node, panel, { name, heightPx, widthPx }) });
      created?.(node);
    },

    onNodeOutputsUpdated(outputs) {
      for (const [id, output] of Object.entries(outputs)) show(id, output);
    },
  });

  return setText;
}
