"""Which files a graph needs, and which are here, wrong or missing; a known one that a person asks for is fetched."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import Hub, hub_stand_in
from qwenimage_lowvram.engine.errors import InvalidRequest
from qwenimage_lowvram.engine.files.known_files import KNOWN_FOLDERS, VAE, known
from qwenimage_lowvram.nodes.model_check import (
    HERE,
    MISSING,
    WRONG,
    checks_of,
    download_folder,
    family_of_file,
    state_of,
)
from qwenimage_lowvram.nodes.model_downloads import DONE, EVENT, FAILED, RUNNING, STOPPED, Downloads

FOLDER = "from the folder"


def prompt_of(transformer: str, text_encoder: str = FOLDER, vae: str = FOLDER) -> dict[str, Any]:
    loader = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    lora = {"model": ["1", 0], "lora_name": "Qwen-Image-Lightning-8steps-V2.0-bf16.safetensors"}
    return {
        "1": {"class_type": "QwenLowVRAMLoader", "inputs": loader},
        "2": {"class_type": "LoraLoaderModelOnly", "inputs": lora},
    }


@pytest.fixture
def folder(models: Callable[[str, Path], None], small_pipeline: Path) -> str:
    models("diffusers", small_pipeline.parent)
    return f"{small_pipeline.name} (folder)"


@pytest.fixture
def vaes(models: Callable[[str, Path], None], tmp_path: Path) -> Path:
    models("vae", tmp_path)
    return tmp_path


def test_what_is_here_and_what_is_missing_is_told_with_size_and_links(folder: str) -> None:
    model, text, vae, lora = checks_of(prompt_of(folder, "qwen_2.5_vl_7b_fp8_scaled.safetensors", "mine.safetensors"))
    assert (model.folder, model.state, model.nodes) == ("diffusers", HERE, ("1",))
    assert (text.folder, text.state, text.size) == ("text_encoders", MISSING, "9.4 GB")
    assert [link["source"] for link in text.links] == ["hub", "mirror"]
    assert all(link["url"].endswith("/qwen_2.5_vl_7b_fp8_scaled.safetensors") for link in text.links)
    assert (vae.state, vae.size, vae.links) == (MISSING, "", ())
    assert (lora.folder, lora.state, lora.size, lora.nodes) == ("loras", MISSING, "0.85 GB", ("2",))


def test_a_cut_file_and_one_of_another_kind_are_wrong(
    folder: str, vaes: Path, small_pipeline: Path, models: Callable[[str, Path], None]
) -> None:
    whole = next((small_pipeline / "vae").glob("*.safetensors")).read_bytes()
    (vaes / "cut.safetensors").write_bytes(whole[:-1])
    (vaes / "good.safetensors").write_bytes(whole)
    other = next((small_pipeline / "text_encoder").glob("*.safetensors"))
    (vaes / "other.safetensors").write_bytes(other.read_bytes())
    states = {}
    for name in ("cut", "good", "other"):
        _, vae, _ = checks_of(prompt_of(folder, vae=f"{name}.safetensors"))
        states[name] = (vae.state, vae.values.get("code"))
    assert states["good"] == (HERE, None)
    assert states["other"] == (WRONG, "model.other_kind")
    assert states["cut"] == (WRONG, "safetensors.cut_off")


def test_a_file_that_one_node_takes_and_another_does_not_is_wrong(
    folder: str, vaes: Path, small_pipeline: Path, models: Callable[[str, Path], None], diffusers_21: Path
) -> None:
    models("diffusers", diffusers_21)
    (of_21,) = (f"{found.name} (folder)" for found in diffusers_21.iterdir())
    vae = "shared.safetensors"
    (vaes / vae).write_bytes(next((small_pipeline / "vae").glob("*.safetensors")).read_bytes())
    for first, second in ((folder, of_21), (of_21, folder)):
        loaders = {"1": prompt_of(first, vae=vae)["1"], "3": prompt_of(second, vae=vae)["1"]}
        (shared,) = (file for file in checks_of(loaders) if file.name == vae)
        assert (shared.state, shared.nodes) == (WRONG, ("1", "3"))


def test_the_vae_is_looked_at_where_the_transformer_is_missing(folder: str, vaes: Path, small_pipeline: Path) -> None:
    whole = next((small_pipeline / "vae").glob("*.safetensors")).read_bytes()
    (vaes / VAE.name).write_bytes(whole)
    model, vae, _ = checks_of(prompt_of("qwen_image_fp8_e4m3fn.safetensors", vae=VAE.name))
    assert (model.state, model.size) == (MISSING, "20.4 GB")
    assert vae.state == HERE


@pytest.mark.parametrize(
    "inputs", [None, [], {}, {"transformer": ["2", 0], "vae": 3}, {"transformer": "../../etc/passwd"}]
)
def test_nonsense_is_no_error_and_reaches_no_file(folder: str, inputs: Any) -> None:
    found = checks_of({"1": {"class_type": "QwenLowVRAMLoader", "inputs": inputs}})
    assert [each.state for each in found] in ([], [MISSING])


def test_a_file_is_known_by_its_header_whatever_its_name(vaes: Path, small_pipeline: Path) -> None:
    (vaes / "mine.safetensors").write_bytes(next((small_pipeline / "vae").glob("*.safetensors")).read_bytes())
    (vaes / "qwen_image_x.safetensors").write_bytes(
        next((small_pipeline / "text_encoder").glob("*.safetensors")).read_bytes()
    )
    files = [("vae", "mine.safetensors"), ("vae", "qwen_image_x.safetensors"), ("vae", "gone.safetensors")]
    assert [family_of_file(*file) for file in files] == ["qwen_image", "other", ""]
    assert family_of_file("checkpoints", "mine.safetensors") == ""
    assert family_of_file("vae", "../vae/mine.safetensors") == ""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_stand_in() as given:
        yield given


class Page:
    """What all pages are sent."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def send(self, event: str, data: dict[str, Any]) -> None:
        assert event == EVENT
        self.events.append(data)


def test_a_known_file_comes_to_its_place_and_is_here_then(hub: Hub, vaes: Path, small_pipeline: Path) -> None:
    whole = next((small_pipeline / "vae").glob("*.safetensors")).read_bytes()
    hub.files[VAE.url_at("")] = whole
    assert state_of(VAE) == MISSING
    page = Page()
    downloads = Downloads(page.send)
    assert downloads.now is None
    downloads.start(VAE, vaes, "hub")
    downloads.wait()
    assert state_of(VAE) == HERE
    assert downloads.now == page.events[-1]
    assert (page.events[-1]["state"], page.events[-1]["done_bytes"]) == (DONE, len(whole))
    assert [each["state"] for each in page.events[:-1]] == ["running"] * (len(page.events) - 1)


def test_a_transformer_comes_to_the_folder_that_the_page_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import folder_paths

    wanted = known("diffusion_models", "qwen_image_fp8_e4m3fn.safetensors")
    assert wanted is not None
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    own = [str(tmp_path / "unet"), str(tmp_path / "diffusion_models")]  # in ComfyUI's order
    disk = str(tmp_path / "large disk" / "unet")  # a person's default, of extra_model_paths.yaml
    for folders, first in ((own, own[1]), ([disk, *own], disk), (own[:1], own[0])):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", (folders, set()))
        assert download_folder(wanted) == Path(first)


def test_one_at_a_time_and_a_stopped_one_goes_on_later(hub: Hub, vaes: Path, small_pipeline: Path) -> None:
    whole = next((small_pipeline / "vae").glob("*.safetensors")).read_bytes()
    hub.files[VAE.url_at("")] = whole
    page, came, tried = Page(), threading.Event(), threading.Event()

    def send(event: str, given: dict[str, Any]) -> None:
        page.send(event, given)
        if given["done_bytes"] and given["state"] == RUNNING:
            came.set()
            assert tried.wait(60)

    downloads = Downloads(send, between_seconds=0)
    downloads.start(VAE, vaes, "hub")
    assert came.wait(60)
    with pytest.raises(InvalidRequest, match="running already"):
        downloads.start(VAE, vaes, "hub")
    downloads.stop()
    tried.set()
    downloads.wait()
    assert page.events[-1]["state"] == STOPPED
    assert state_of(VAE) == MISSING
    (part,) = vaes.iterdir()
    assert part.suffix == ".part"
    downloads.start(VAE, vaes, "hub")
    downloads.wait()
    assert page.events[-1]["state"] == DONE
    assert (vaes / VAE.name).read_bytes() == whole


def test_no_network_is_told_in_words(vaes: Path) -> None:
    page = Page()
    downloads = Downloads(page.send)
    for wanted in (VAE, KNOWN_FOLDERS[0]):  # the tests' own setting is to stay off the network
        downloads.start(wanted, vaes, "mirror")
        downloads.wait()
        assert page.events[-1]["state"] == FAILED
        assert page.events[-1]["values"]["code"] == "download.no_network"
        assert "hf-mirror.com cannot be reached" in page.events[-1]["text"]
    assert list(vaes.iterdir()) == []
