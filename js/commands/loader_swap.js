// Puts this pack's loader in the place of ComfyUI's three in a saved graph, also inside of subgraphs. A graph in, a new
// graph and what was done out; touches no page.

const OURS = "QwenLowVRAMLoader";
// by class: what it gives, the names of its widgets in their order, and which of ours the first one becomes
const LOADERS = {
  UNETLoader: { gives: "MODEL", folder: "diffusion_models", widgets: ["unet_name", "weight_dtype"] },
  UnetLoaderGGUF: { gives: "MODEL", folder: "diffusion_models", widgets: ["unet_name"] },
  UnetLoaderGGUFAdvanced: {
    gives: "MODEL", folder: "diffusion_models",
    widgets: ["unet_name", "dequant_dtype", "patch_dtype", "patch_on_device"],
  },
  CLIPLoader: { gives: "CLIP", folder: "text_encoders", widgets: ["clip_name", "type", "device"] },
  CLIPLoaderGGUF: { gives: "CLIP", folder: "text_encoders", widgets: ["clip_name", "type"] },
  VAELoader: { gives: "VAE", folder: "vae", widgets: ["vae_name"] },
};
const FILE_INPUTS = { MODEL: "transformer", CLIP: "text_encoder", VAE: "vae" };
const SLOTS = { MODEL: 0, CLIP: 1, VAE: 2 };
// other widgets that we have, too: theirs, ours, and what a value becomes for a file of that name
const FP8 = "fp8_e4m3fn_scaled";
const SETTINGS = {
  weight_dtype: [
    "weight_format",
    (name) => {
      const fp8 = /bf16|fp16|fp32/i.test(name) ? FP8 : "auto"; // files in fp8 stay as they are
      return { default: "auto", fp8_e4m3fn: fp8, fp8_e4m3fn_fast: fp8, fp8_e5m2: fp8 };
    },
  ],
  device: ["text_encoder_device", () => ({ default: "auto", cpu: "cpu" })],
};
const QWEN_TYPE = "qwen_image"; // of ComfyUI's CLIPLoader, for the whole family
const OUTSIDE = -10; // the origin of links from a subgraph's inputs
const READABLE = /\.(safetensors|sft|gguf)$/i;
const SIZE = [400, 560]; // of our loader, with its panel
const GAP = 60, TITLE = 30, MARGIN = 20;

/** Which family of ours a file belongs to by its name: "qwen_image", "qwen_image_21", or "" where the name says nothing. */
export function familyByName(folder, name) {
  const said = String(name).toLowerCase().split(/[\\/]/).at(-1).replaceAll(/[-. ]/g, "_");
  if (folder === "text_encoders") {
    if (/qwen_?3_?vl_8b/.test(said)) return "qwen_image_21";
    return /qwen_?2_?5_vl/.test(said) ? "qwen_image" : "";
  }
  if (/qwen_?image_?2_?1(?!\d)/.test(said)) return "qwen_image_21";
  return /qwen_?image/.test(said) ? "qwen_image" : "";
}

/** [folder, name] of each file that a loader of ComfyUI's names, in the graph and its subgraphs. */
export function namedFiles(workflow) {
  const graphs = [workflow, ...(workflow.definitions?.subgraphs ?? [])];
  const files = graphs.flatMap((graph) => loadersOf(levelOf(graph, false), () => "").map(({ folder, name }) => [folder, name]));
  return [...new Map(files.filter(([, name]) => typeof name === "string").map((file) => [file.join("/"), file])).values()];
}

/**
 * The graph with our loader wherever the three loaders of a Qwen-Image model stand. `inputs`: of our loader, in its order,
 * {name, type, value: its default}. `familyOf(folder, name)`: "qwen_image", "qwen_image_21", "other" (known to be
 * something else) or "" (not known). The graph that is given stays as it is.
 *
 * Returns {workflow, replaced: [{graph, transformer, text_encoder, vae, quantized}], left: [{graph, name, why}]}; graph: the
 * name of the subgraph, or "". why: "unknown" (a Qwen-Image text encoder beside a file that nothing tells to be a
 * Qwen-Image model), "alone" (no text encoder or VAE for it), "linked" (a setting of the loader comes by a link),
 * "kept" (it stands elsewhere, or another model may use it), or "other" (another model's).
 */
export function swapLoaders(given, inputs, familyOf = familyByName) {
  const workflow = structuredClone(given);
  const levels = [workflow, ...(workflow.definitions?.subgraphs ?? [])].map((graph, index) => levelOf(graph, index > 0));
  const familyIfRead = (folder, name) => (READABLE.test(name) ? familyOf(folder, name) : "other");
  const found = levels.flatMap((level) => loadersOf(level, familyIfRead));
  const done = { replaced: [], left: [] };
  const say = (loader, why) => done.left.push({ graph: loader.level.name, name: loader.name, why });
  const merged = new Set();
  for (const model of found.filter((loader) => loader.gives === "MODEL")) {
    const set = [model, partner(model, "CLIP", found), partner(model, "VAE", found)];
    const [, clip, vae] = set;
    const own = set.filter((loader) => loader && loader.level === model.level && !merged.has(loader) && !serves(loader, found));
    if (!isOfFamily(model)) say(model, model.family || clip?.level !== model.level ? "other" : "unknown");
    else if (!clip || !vae) say(model, "alone");
    else if (own.some((loader) => loader.isLinked)) say(model, "linked");
    else {
      for (const loader of own) merged.add(loader);
      for (const loader of set) if (!merged.has(loader)) say(loader, "kept");
      done.replaced.push(replaceBy(own, set, inputs, levels));
    }
  }
  return { workflow, ...done };
}

const isOfFamily = (loader) => Boolean(loader.family) && loader.family !== "other";

/** Whether a VAE that is not surely Qwen-Image's stands where another model may use it, too. */
const serves = (loader, found) =>
  loader.gives === "VAE" && !isOfFamily(loader) &&
  found.some((other) => other.gives === "MODEL" && other.level === loader.level && !isOfFamily(other));

/** A graph or a subgraph with its links as {id, from, fromSlot, to, toSlot} that can be set. */
function levelOf(graph, inside) {
  const links = new Map();
  const names = ["id", "origin_id", "origin_slot", "target_id", "target_slot"];
  for (const link of graph.links ?? []) {
    const key = (position) => (Array.isArray(link) ? position : names[position]);
    const end = {};
    for (const [position, name] of ["id", "from", "fromSlot", "to", "toSlot"].entries())
      Object.defineProperty(end, name, { get: () => link[key(position)], set: (value) => (link[key(position)] = value) });
    links.set(end.id, end);
  }
  return { graph, links, name: inside ? graph.name : "", id: inside ? graph.id : undefined };
}

function loadersOf(level, familyOf) {
  return level.graph.nodes.filter((node) => node.type in LOADERS).map((node) => {
    const { gives, folder, widgets } = LOADERS[node.type];
    const values = node.widgets_values ?? [];
    const value = (name) => (Array.isArray(values) ? values[widgets.indexOf(name)] : values[name]);
    const name = value(widgets[0]);
    const linked = (node.inputs ?? []).filter((input) => input.link != null && input.name !== widgets[0]);
    const isLinked = linked.some(({ name, link }) => !(name in SETTINGS) || level.links.get(link)?.from !== OUTSIDE);
    return { level, node, gives, folder, name, value, isLinked, file: widgets[0], type: value("type"), family: familyOf(folder, name) };
  });
}

/** All nodes that something of a node reaches, in its graph. */
function downstream({ node, level }) {
  const reached = new Set([node.id]);
  for (const id of reached)
    for (const link of level.links.values()) if (link.from === id && link.to >= 0) reached.add(link.to);
  return reached;
}

/** The loader that a model is used with: in its own graph the one that meets it; if it is known to be ours, else the
 *  only one there, or anywhere. */
function partner(model, gives, found) {
  const fits = (loader) =>
    loader.gives === gives && loader.family !== "other" && (gives !== "CLIP" || loader.type === QWEN_TYPE) &&
    (!loader.family || !model.family || gives === "VAE" || loader.family === model.family);
  const fitting = found.filter(fits);
  const beside = fitting.filter((loader) => loader.level === model.level && loader.node.mode === model.node.mode);
  const reached = downstream(model);
  const meets = (loader) => [...downstream(loader)].some((id) => reached.has(id));
  const meeting = beside.filter(meets);
  if (meeting.length) return meeting.find((loader) => loader.family === model.family) ?? meeting[0];
  if (!isOfFamily(model)) return undefined;
  if (beside.length === 1) return beside[0];
  return new Set(fitting.map((loader) => loader.name)).size === 1 ? fitting[0] : undefined;
}

/** Make our loader of the model's node, take the links of the loaders `own` over, and remove the others. */
function replaceBy(own, set, inputs, levels) {
  const [model] = own;
  const { node, level } = model;
  const values = Object.fromEntries(inputs.map(({ name, value }) => [name, value]));
  const sockets = inputs.map(({ name, type }) => ({ name, type, widget: { name }, link: null }));
  const outputs = ["MODEL", "CLIP", "VAE"].map((type) => ({ name: type, type, links: [] }));
  for (const loader of set) values[FILE_INPUTS[loader.gives]] = loader.name;
  for (const loader of own) {
    const become = { [loader.file]: FILE_INPUTS[loader.gives] };
    for (const [theirs, [ours, choices]] of Object.entries(SETTINGS)) {
      if (loader.value(theirs) === undefined) continue;
      become[theirs] = ours;
      values[ours] = choices(loader.name)[loader.value(theirs)] ?? values[ours];
    }
    takeInputs(loader, become, node.id, sockets, levels);
    takeOutputs(loader, node.id, outputs);
    handOn(loader, become, node.id, levels);
  }
  const place = placeFor(level, own.map((loader) => loader.node));
  const models = own.flatMap((loader) => loader.node.properties?.models ?? []);
  level.graph.nodes = level.graph.nodes.filter((each) => each === node || !own.some((loader) => loader.node === each));
  const { id, flags, order, mode, color, bgcolor } = node;
  for (const key of Object.keys(node)) delete node[key];
  const looks = { ...(color && { color }), ...(bgcolor && { bgcolor }) };
  Object.assign(node, { id, type: OURS, pos: place, size: [...SIZE], flags: { ...flags }, order, mode, inputs: sockets, outputs });
  Object.assign(node, looks, { properties: { "Node name for S&R": OURS, ...(models.length && { models }) } });
  node.widgets_values = inputs.map(({ name }) => values[name]);
  const files = { transformer: values.transformer, text_encoder: values.text_encoder, vae: values.vae };
  return { graph: level.name, ...files, quantized: values.weight_format === FP8 };
}

/** Links to a loader's widgets go to ours. A setting that a subgraph hands out keeps its place there, in our words. */
function takeInputs({ node, level, name: file }, become, id, sockets, levels) {
  for (const { name, link } of node.inputs ?? []) {
    const end = level.links.get(link);
    if (!end) continue;
    const slot = sockets.findIndex((socket) => socket.name === become[name]);
    Object.assign(end, { to: id, toSlot: slot });
    sockets[slot].link = end.id;
    if (name in SETTINGS) translateOutside(level, end.fromSlot, SETTINGS[name][1](file), levels);
  }
}

/** The values that nodes of a subgraph hold for its input number `slot`. */
function translateOutside({ graph, links, id }, slot, choices, levels) {
  const isWidget = ({ linkIds }) =>
    (linkIds ?? []).some((each) => {
      const end = links.get(each);
      const socket = graph.nodes.find((node) => node.id === end?.to)?.inputs?.[end.toSlot];
      return Boolean(socket?.widget);
    });
  const position = graph.inputs.slice(0, slot).filter(isWidget).length;
  for (const { values } of instancesOf(id, levels))
    if (Array.isArray(values) && values[position] in choices) values[position] = choices[values[position]];
}

function instancesOf(id, levels) {
  const nodes = levels.flatMap((level) => level.graph.nodes).filter((node) => node.type === id);
  return nodes.map((node) => ({ node, values: node.widgets_values }));
}

function takeOutputs({ node, level, gives }, id, outputs) {
  for (const end of level.links.values()) {
    if (end.from !== node.id) continue;
    Object.assign(end, { from: id, fromSlot: SLOTS[gives] });
    outputs[SLOTS[gives]].links.push(end.id);
  }
}

/** Widgets that a subgraph's node or the page's app mode shows of a loader are ours from now on. */
function handOn({ node, level }, become, id, levels) {
  const renamed = (entry) => {
    if (!Array.isArray(entry) || String(entry[0]) !== String(node.id) || !(entry[1] in become)) return;
    entry[0] = typeof entry[0] === "string" ? String(id) : id;
    entry[1] = become[entry[1]];
  };
  if (level.id === undefined) level.graph.extra?.linearData?.inputs?.forEach(renamed);
  else for (const { node: outside } of instancesOf(level.id, levels)) outside.properties?.proxyWidgets?.forEach?.(renamed);
}

const rectOf = ({ pos, size }) => {
  const [x, y] = [pos[0] ?? pos["0"], pos[1] ?? pos["1"]];
  return [x, y - TITLE, x + (size[0] ?? size["0"]), y + (size[1] ?? size["1"])];
};
const meet = (a, b, room = 0) => a[0] < b[2] + room && b[0] < a[2] + room && a[1] < b[3] + room && b[1] < a[3] + room;

/** Where our loader lies on nothing: in the place of the others, else to their left. Their group grows round it. */
function placeFor({ graph }, nodes) {
  const others = graph.nodes.filter((node) => !nodes.includes(node)).map(rectOf);
  if (graph.inputNode?.bounding) {
    const [x, y, width, height] = graph.inputNode.bounding;
    others.push([x, y, x + width, y + height]);
  }
  const taken = nodes.map(rectOf);
  const [left, top] = [0, 1].map((side) => Math.min(...taken.map((rect) => rect[side])));
  const bottom = Math.max(...taken.map((rect) => rect[3]));
  const rectAt = (x, y) => [x, y, x + SIZE[0], y + TITLE + SIZE[1]];
  const isFree = (rect) => !others.some((other) => meet(rect, other, MARGIN));
  for (const y of [top, bottom - SIZE[1] - TITLE]) {
    const rect = rectAt(left, y);
    if (!isFree(rect)) continue;
    growGroup(graph, taken, rect, others);
    return [left, y + TITLE];
  }
  let x = Math.min(left, ...others.map((rect) => rect[0])) - SIZE[0] - GAP;
  return [x, top + TITLE];
}

function growGroup(graph, taken, rect, others) {
  const within = (inner, outer) => inner[0] >= outer[0] && inner[1] >= outer[1] && inner[2] <= outer[2] && inner[3] <= outer[3];
  for (const group of graph.groups ?? []) {
    const [x, y, width, height] = group.bounding;
    const now = [x, y, x + width, y + height];
    if (!taken.every((each) => within(each, now))) continue;
    const larger = [0, 1, 2, 3].map((side) =>
      side < 2 ? Math.min(now[side], rect[side] - MARGIN) : Math.max(now[side], rect[side] + MARGIN));
    if (others.some((other) => meet(larger, other) && !meet(now, other))) continue; // it would take strangers in
    group.bounding = [larger[0], larger[1], larger[2] - larger[0], larger[3] - larger[1]];
  }
}
