// Errors and what nodes tell in Chinese, by the code that the server sends with its English text. The texts are in
// error_words_zh.json, which is fetched once, and only where the page is Chinese. Touches no page.

const FIELD = /\{\{|\}\}|\{(\w+)(?::(\d))?\}/g; // {{, }}, {name}, or {name:digits}
const WIDE = /[\u2e80-\u9fff\uff00-\uffef]/g; // Chinese characters and their punctuation
const WIDE_SPACE = "\u3000";
const NAMING = ["name", "input", "setting"]; // values that name an input

let texts = null; // what the file holds, once it is here
let asked = null;

/** Have the Chinese texts at hand. Until they are here, and where they cannot be fetched, messages are in English. */
export function fetchChinese() {
  asked ??= fetch(new URL("./error_words_zh.json", import.meta.url))
    .then((answer) => answer.json())
    .then((given) => (texts = given))
    .catch(() => (asked = null)); // the next message asks again
  return asked;
}

function size(bytes) {
  return bytes >= 2 ** 30 / 10 ? `${(bytes / 2 ** 30).toFixed(2)} GiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

/** A text among an error's values in Chinese, where it is one that is known; else as it is. */
function translated(zh, name, text) {
  const own = name === "node" ? zh.comfyui_nodes[text] : NAMING.includes(name) && zh.inputs[text];
  const known = own || zh.words[text];
  if (known !== undefined) return known;
  const patterns = zh.patterns[name] ?? [];
  return patterns.reduce((said, [pattern, chinese]) => said.replace(new RegExp(pattern, "g"), chinese), text);
}

function shown(zh, name, value, digits) {
  if (value?.code) return chineseOf(zh, value);
  if (Array.isArray(value)) {
    const all = value.map((each) => shown(zh, name, each));
    return value.length && value.every((each) => typeof each === "string") ? all.join("、") : `[${all.join(", ")}]`;
  }
  if (typeof value === "string") return translated(zh, name, value);
  if (typeof value !== "number") return value === true ? "True" : value === false ? "False" : "None"; // as Python has them
  if (name.endsWith("_bytes")) return size(value);
  return digits ? value.toFixed(digits) : String(value);
}

/** An error's message in Chinese: `zh` is what error_words_zh.json holds. */
export function chineseOf(zh, { code, values, text }) {
  if (!zh.texts[code]) return text;
  const said = zh.texts[code].replace(FIELD, (field, name, digits) =>
    name ? shown(zh, name, values[name], digits) : field[0],
  );
  return values.input ? `${zh.inputs[values.input] ?? values.input}：${said}` : said;
}

/** A table's rows as lines, columns below each other. Chinese characters are wider than others, by how much a font
 *  decides: a cell is filled up with spaces of both widths. */
function aligned(rows) {
  const wide = (cell) => cell.match(WIDE)?.length ?? 0;
  const most = (column, count) => Math.max(...rows.map((row) => count(row[column])));
  const filled = (cell, column) => {
    const spaces = most(column, (other) => other.length - wide(other)) - (cell.length - wide(cell));
    return cell + WIDE_SPACE.repeat(most(column, wide) - wide(cell)) + " ".repeat(spaces);
  };
  return rows.map((row) => row.map(filled).join("  ").trimEnd()).join("\n");
}

function chinesePart(zh, part) {
  if (typeof part === "string") return part;
  if (!part.rows) return chineseOf(zh, part);
  return aligned(part.rows.map((row) => row.map((cell) => zh.cells[cell] ?? translated(zh, "cell", cell))));
}

/** What a node tells, in Chinese: sentences with their codes, and tables, a part below the other. */
export const chineseParts = (zh, parts) => parts.map((part) => chinesePart(zh, part)).join("\n");

/** The same, as soon as the texts are here; `english` where they cannot be fetched. */
export async function toldInChinese(parts, english) {
  if (!texts) await fetchChinese();
  return texts ? chineseParts(texts, parts) : english;
}

/** A sentence that the server made of a fixed few, in Chinese where the texts are here; `name`: of the value it is. */
export const chineseSentence = (name, text) => (texts && text ? translated(texts, name, text) : text);

/** The message of an error, as a page in that language says it: the numbers and the way out stand in it. */
export function messageOf(chinese, error) {
  if (!chinese) return error.text;
  if (!texts) fetchChinese();
  return texts ? chineseOf(texts, error) : error.text;
}
