"""Encode Edit Prompt shows the image inputs that are linked and a free one, in new, grown, loaded and moved graphs."""

from typing import Any

from devtools.workflow import to_prompt

from .conftest import in_both_renderers

pytestmark = in_both_renderers
EDIT = "QwenLowVRAMEncodeEditPrompt"
# a text for the prompt, whose input lies behind those of the images
BUILD = """([kind, count]) => {
  const graph = window.app.graph;
  graph.clear();
  const add = (name) => { const node = window.LiteGraph.createNode(name); graph.add(node); return node; };
  const [edit, text, save] = [kind, 'StringConcatenate', 'SaveLatent'].map(add);
  edit.connect(2, save, 0);
  text.connect(0, edit, edit.inputs.findIndex(({ name }) => name === 'positive'));
  const images = Array.from({ length: count }, () => add('EmptyImage'));
  return images.map(({ id }) => id);
}"""
LINK = """([kind, source, name]) => {
  const { nodes } = window.app.graph;
  const edit = nodes.find(({ type }) => type === kind);
  const input = edit.inputs.findIndex((each) => each.name === name);
  if (source === null) edit.disconnectInput(input);
  else window.app.graph.getNodeById(source).connect(0, edit, input);
  return input;
}"""
WAIT = "() => new Promise((done) => setTimeout(done, 300))"
# name of each image input, of the inputs at which links arrive by their own account, and the heights
SHOWN = """(kind) => {
  const { graph } = window.app;
  const edit = graph.nodes.find(({ type }) => type === kind);
  const arriving = edit.inputs.filter(({ link }) => link !== null).map((input) => [
    input.name, edit.inputs[graph.getLink(input.link).target_slot].name]);
  const images = edit.inputs.map(({ name }) => name).filter((name) => name.startsWith('image'));
  return { images: images.length, inOrder: images.every((name, i) => name === `image${i + 1}`), arriving,
           missing: Math.max(0, edit.computeSize()[1] - edit.size[1]), height: edit.size[1] };
}"""
# what is drawn: the Vue renderer has an element for each input
DRAWN = """() => [...document.querySelectorAll('[data-node-id] .lg-slot--input')]
  .map((slot) => slot.innerText.trim()).filter((text) => /^image\\d+$/.test(text))"""
SUBGRAPH = """(kind) => {
  const { graph } = window.app;
  const edit = graph.nodes.find(({ type }) => type === kind);
  const { node } = graph.convertToSubgraph(new Set([edit]));
  return node.inputs.map(({ name }) => name);
}"""


def link(page: Any, source: int | None, name: str) -> None:
    assert page.evaluate(LINK, [EDIT, source, name]) >= 0, f"{name} is not shown."
    page.evaluate(WAIT)


def shown(page: Any) -> int:
    """How many image inputs the node has; in order, with every link at its own input, and room for all of them."""
    state = page.evaluate(SHOWN, EDIT)
    assert state["inOrder"]
    assert all(name == arrives for name, arrives in state["arriving"]), state["arriving"]
    assert "positive" in dict(state["arriving"])
    assert state["missing"] == 0
    return int(state["images"])


def grown(page: Any, count: int) -> list[int]:
    """A graph with so many images linked; their nodes."""
    images: list[int] = page.evaluate(BUILD, [EDIT, count])
    page.evaluate(WAIT)
    for number, image in enumerate(images, start=1):
        link(page, image, f"image{number}")
    return images


def test_an_input_appears_behind_the_last_linked_one_and_goes_again(page: Any, vue: bool) -> None:
    images = page.evaluate(BUILD, [EDIT, 12])
    page.evaluate(WAIT)
    assert shown(page) == 3
    height = page.evaluate(SHOWN, EDIT)["height"]
    for number, image in enumerate(images, start=1):
        link(page, image, f"image{number}")
        assert shown(page) == max(3, min(12, number + 1))
    assert page.evaluate(SHOWN, EDIT)["height"] == height + 9 * 20
    prompt = next(node for node in page.prompt().values() if node["class_type"] == EDIT)
    assert [prompt["inputs"][f"image{i + 1}"] for i in range(12)] == [[str(image), 0] for image in images]
    for name in ("image12", "image10"):
        link(page, None, name)
    assert shown(page) == 12  # image11 is still linked
    link(page, None, "image11")
    assert shown(page) == 10
    if vue:
        assert page.evaluate(DRAWN) == [f"image{i + 1}" for i in range(10)]
    for number in range(1, 10):
        link(page, None, f"image{number}")
    assert shown(page) == 3
    assert page.evaluate(SHOWN, EDIT)["height"] == height
    assert page.unexpected_messages() == []


def test_a_grown_graph_comes_back_as_it_was_saved(page: Any, object_info: dict[str, Any]) -> None:
    grown(page, 5)
    saved, prompt = page.serialize(), page.prompt()
    page.load(saved)
    assert shown(page) == 6
    again = page.serialize()
    assert again["links"] == saved["links"]
    sizes = [next(node["size"] for node in graph["nodes"] if node["type"] == EDIT) for graph in (saved, again)]
    assert sizes[0] == sizes[1]
    assert page.prompt() == prompt
    sent = {key: {part: node[part] for part in ("class_type", "inputs")} for key, node in prompt.items()}
    assert sent == to_prompt(saved, object_info)


def test_a_graph_with_the_inputs_of_another_release_opens_with_its_links(page: Any) -> None:
    grown(page, 2)
    saved, prompt = page.serialize(), page.prompt()
    edit = next(node for node in saved["nodes"] if node["type"] == EDIT)
    template = edit["inputs"][4]
    assert template["name"] == "image3"
    every = [*edit["inputs"][:5], *({**template, "name": f"image{i}"} for i in range(4, 13)), *edit["inputs"][5:]]
    edit["inputs"] = every
    for entry in saved["links"]:
        if entry[3] == edit["id"] and entry[4] > 4:
            entry[4] += 9
    page.load(saved)
    assert shown(page) == 3
    assert page.prompt() == prompt


def test_a_prompt_that_leaves_inputs_free_opens_with_all_its_images(page: Any) -> None:
    images = grown(page, 3)
    prompt = page.prompt()
    edit = next(node for node in prompt.values() if node["class_type"] == EDIT)
    edit["inputs"]["image9"] = edit["inputs"].pop("image2")
    page.evaluate("(prompt) => window.app.loadApiJson(prompt, 'test')", prompt)
    page.evaluate(WAIT)
    assert shown(page) == 10
    loaded = next(node for node in page.prompt().values() if node["class_type"] == EDIT)["inputs"]
    assert {name: loaded.get(name) for name in ("image1", "image2", "image3", "image9")} == {
        "image1": [str(images[0]), 0],
        "image2": None,
        "image3": [str(images[2]), 0],
        "image9": [str(images[1]), 0],
    }


def test_a_subgraph_keeps_the_linked_images(page: Any) -> None:
    images = grown(page, 4)
    assert page.evaluate(SUBGRAPH, EDIT)[:4] == ["image1", "image2", "image3", "image4"]
    page.evaluate(WAIT)
    inputs = next(node for node in page.prompt().values() if node["class_type"] == EDIT)["inputs"]
    assert [inputs[f"image{i + 1}"] for i in range(4)] == [[str(image), 0] for image in images]
    assert page.unexpected_messages() == []
