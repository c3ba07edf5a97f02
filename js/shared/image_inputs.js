// Inputs image1, image2, ... that a node shows as they are needed. The page imports this file like every script; alone
// it does nothing.
const NAME = /^image\d+$/;
const SLOT_PX = 20; // the page's height of an input

/**
 * From now on the node shows its image inputs up to the one behind the last linked, and `least`, 1 or more, at the least.
 * Call it when the node is made; a graph that is being loaded still finds all of them.
 */
export function growImageInputs(node, least) {
  const all = node.inputs
    .filter((input) => NAME.test(input.name))
    .map(({ name, type, shape, label, localized_name }) => ({ name, type, shape, label, localized_name }));
  let saved; // the size of a graph that is being loaded
  let waiting = false;

  const indexOf = (name) => node.inputs.findIndex((input) => input.name === name);
  const shown = () => node.inputs.filter((input) => NAME.test(input.name)).length;

  function wanted() {
    const linked = all.map(({ name }) => node.inputs[indexOf(name)]?.link != null);
    return Math.min(all.length, Math.max(least, linked.lastIndexOf(true) + 2));
  }

  function fit() {
    waiting = false;
    const [before, count] = [shown(), wanted()];
    if (before === count && !saved) return;
    const grown = [node.size[0], node.size[1] + SLOT_PX * (count - before)]; // as tall as a person made the rest
    for (const { name } of all.slice(count)) {
      const index = indexOf(name);
      if (index >= 0) node.removeInput(index);
    }
    for (const [position, { name, type, ...look }] of all.slice(0, count).entries()) {
      if (indexOf(name) < 0) insert(node, indexOf(all[position - 1].name) + 1, name, type, look);
    }
    const [width, height] = saved ?? grown;
    saved = undefined;
    node.setSize([width, Math.max(height, node.computeSize()[1])]);
    node.setDirtyCanvas(true, true);
  }

  function fitSoon() {
    if (!waiting) queueMicrotask(fit); // after all that changes links now, a whole graph that loads included
    waiting = true;
  }

  const { onConnectionsChange, onConfigure } = node;
  node.onConnectionsChange = function (...change) {
    const answer = onConnectionsChange?.apply(this, change);
    fitSoon();
    return answer;
  };
  node.onConfigure = function (...values) {
    const { size } = values[0];
    if (size) saved = [size[0], size[1]]; // all inputs together may have needed more
    fitSoon();
    return onConfigure?.apply(this, values);
  };
  fitSoon();
}

/** Add an input before the one at `index`; links to those behind it follow. */
function insert(node, index, name, type, look) {
  const input = node.addInput(name, type, look);
  const [last] = node.inputs.splice(node.inputs.indexOf(input), 1);
  node.inputs.splice(index, 0, last);
  for (const [slot, { link }] of node.inputs.entries()) {
    const found = link == null ? undefined : node.graph?.getLink(link);
    if (found) found.target_slot = slot;
  }
}
