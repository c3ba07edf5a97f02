// A window over the page that is large enough for a whole plan or report. The keyboard reaches and closes it.
import { copyText } from "./clipboard.js";

export const BUTTON =
  "padding:4px 12px;border:1px solid var(--border-color);border-radius:4px;cursor:pointer;font:13px/20px sans-serif;" +
  "color:var(--input-text);background:var(--comfy-input-bg)";

/** An element with that style and text. */
export function make(tag, css, text = "") {
  const element = document.createElement(tag);
  element.style.cssText = css;
  element.textContent = text;
  return element;
}

function table(rows) {
  const list = make("dl", "display:grid;grid-template-columns:auto 1fr;gap:4px 16px;margin:0 0 16px");
  for (const [name, value] of rows) {
    list.append(make("dt", "opacity:0.8", name), make("dd", "margin:0;overflow-wrap:anywhere", value));
  }
  return list;
}

/** An empty window, not open yet; it goes when it is closed. */
export function makeView(title) {
  const view = make(
    "dialog",
    "width:min(960px,92vw);max-height:86vh;padding:16px 20px;overflow:auto;border-radius:8px;" +
      "border:1px solid var(--border-color);font:13px/20px sans-serif;font-variant-numeric:tabular-nums;" +
      "color:var(--input-text);background:var(--comfy-menu-bg, var(--comfy-input-bg))",
  );
  view.className = "qwen-lowvram-view";
  view.setAttribute("aria-label", title);
  view.addEventListener("close", () => view.remove());
  view.addEventListener("keydown", (event) => event.stopPropagation()); // the page's own keys are not meant
  return view;
}

/** Open it with an error, `rows` of [name, value] and a text below, as far as there are any; goes when it is closed. */
export function openFullView(words, { title, error = "", rows, text }) {
  const view = makeView(title);
  const copy = make("button", BUTTON, words.copy);
  const close = make("button", `${BUTTON};margin-left:8px`, words.close);
  const head = make("div", "display:flex;align-items:center;margin:0 0 12px");
  head.append(make("h2", "flex:1;margin:0;font:600 16px/24px sans-serif", title), copy, close);
  const listed = rows.map(([name, value]) => `${name}: ${value}`).join("\n");
  const whole = [error, listed, text].filter(Boolean).join("\n\n");
  copy.addEventListener("click", async () => {
    const belowTheHead = () => {
      const range = document.createRange();
      range.setStartAfter(head);
      range.setEndAfter(view.lastChild);
      return range;
    };
    copy.textContent = (await copyText(whole, belowTheHead)) ? words.copied : words.selected;
  });
  close.addEventListener("click", () => view.close());
  view.append(head);
  if (error) view.append(make("p", "margin:0 0 16px;white-space:pre-line;overflow-wrap:anywhere;user-select:text", error));
  if (rows.length) view.append(table(rows));
  if (text) {
    const css = "margin:0;white-space:pre-wrap;overflow-wrap:anywhere;user-select:text;font:12px/18px monospace";
    view.append(make("h3", "margin:0 0 4px;font:600 13px/20px sans-serif", words.asLogged), make("pre", css, text));
  }
  document.body.append(view);
  view.showModal();
  close.focus();
}
