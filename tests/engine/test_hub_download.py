"""Model files from a hub, for which a small server stands: resumed, checked, refused in words, never half in place."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_stand_in import COMMIT, Hub, forget_sessions, hub_stand_in
from qwenimage_lowvram.engine.errors import DownloadError, NoNetwork
from qwenimage_lowvram.engine.files import hub_download
from qwenimage_lowvram.engine.files.hub_download import Piece, Stopped, endpoint_of, fetch, pieces_of
from qwenimage_lowvram.engine.files.known_files import KNOWN_FILES, KNOWN_FOLDERS, KnownFile, KnownFolder, known

DATA = bytes(range(256)) * 4096  # 1 MiB
KNOWN = KnownFile("model.safetensors", "vae", "someone/models", "split/model.safetensors")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_stand_in() as given:
        given.files["/someone/models/resolve/main/split/model.safetensors"] = DATA
        yield given


def nothing(name: str, done: int, total: int) -> None:
    pass


def piece(hub: Hub, folder: Path) -> Piece:
    (one,) = pieces_of(KNOWN, folder, hub.url)
    return one


def test_a_file_comes_whole_and_its_progress_is_told(hub: Hub, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    fetch(piece(hub, tmp_path), lambda *said: told.append(said))
    assert (tmp_path / KNOWN.name).read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == [KNOWN.name]
    done = [bytes_ for _, bytes_, _ in told]
    assert done == sorted(done)
    assert len(set(done)) > 10
    assert told[-1] == (KNOWN.name, len(DATA), len(DATA))


def test_a_stopped_download_goes_on_where_it_ended(hub: Hub, tmp_path: Path) -> None:
    def until_half(name: str, done: int, total: int) -> None:
        if done * 2 > total:
            raise Stopped

    with pytest.raises(Stopped):
        fetch(piece(hub, tmp_path), until_half)
    (part,) = tmp_path.iterdir()
    have = part.stat().st_size
    assert part.suffix == ".part"
    assert len(DATA) // 2 < have < len(DATA)
    fetch(piece(hub, tmp_path), nothing)
    assert (tmp_path / KNOWN.name).read_bytes() == DATA
    assert [asked for method, _, asked in hub.asked if method == "GET"] == ["", f"bytes={have}-"]


def test_a_part_of_another_version_is_not_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    old = tmp_path / f"{KNOWN.name}.{'1' * 16}.part"
    old.write_bytes(b"old")
    fetch(piece(hub, tmp_path), nothing)
    assert (tmp_path / KNOWN.name).read_bytes() == DATA
    assert not old.exists()


def test_a_file_that_is_there_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / KNOWN.name).write_bytes(DATA)
    fetch(piece(hub, tmp_path), nothing)
    assert {method for method, _, _ in hub.asked} == {"HEAD"}


@pytest.mark.parametrize("digits", [64, 40], ids=["sha256", "of-git"])
def test_a_damaged_file_never_takes_its_place(hub: Hub, tmp_path: Path, digits: int) -> None:
    hub.etags[next(iter(hub.files))] = "a" * digits
    with pytest.raises(DownloadError, match="arrived damaged"):
        fetch(piece(hub, tmp_path), nothing)
    assert list(tmp_path.iterdir()) == []


def test_a_small_file_is_checked_by_gits_sum(hub: Hub, tmp_path: Path) -> None:
    blob = hashlib.sha1(f"blob {len(DATA)}\0".encode() + DATA).hexdigest()
    hub.etags[next(iter(hub.files))] = blob
    fetch(piece(hub, tmp_path), nothing)
    assert (tmp_path / KNOWN.name).read_bytes() == DATA


def test_a_disk_without_room_is_told_before_anything_comes(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(DownloadError, match=r"needs 1.0 MiB more on the disk, and 0.0 MiB are free") as refused:
        fetch(piece(hub, tmp_path), nothing)
    assert refused.value.code == "download.disk"
    assert [method for method, _, _ in hub.asked] == ["HEAD"]


def test_a_hub_that_does_not_have_it_and_one_that_is_not_there_are_told_apart(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # older hub libraries wait before they try again
    hub.files.clear()
    with pytest.raises(DownloadError) as refused:
        fetch(piece(hub, tmp_path), nothing)
    assert (refused.value.code, refused.value.values["status"]) == ("download.not_there", 404)
    with pytest.raises(NoNetwork) as unreached:
        fetch(Piece("http://127.0.0.1:9/a/b/resolve/main/c", tmp_path / "c"), nothing)
    assert "127.0.0.1:9 cannot be reached" in str(unreached.value)
    assert list(tmp_path.iterdir()) == []


def test_without_leave_to_use_the_network_nothing_is_asked(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    forget_sessions()
    with pytest.raises(NoNetwork):
        fetch(piece(hub, tmp_path), nothing)
    assert hub.asked == []


def test_a_pipeline_folder_comes_without_what_it_does_not_need_and_its_index_comes_last(
    hub: Hub, tmp_path: Path
) -> None:
    folder = KnownFolder("Model", "someone/pipeline")
    names = [
        "README.md",
        "model_index.json",
        "vae/config.json",
        "transformer/a.safetensors",
        "../out/vae/x",
        "vae/../x",
    ]
    listed = {"id": folder.repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
    hub.files["/api/models/someone/pipeline/revision/main"] = json.dumps(listed).encode()
    pieces = pieces_of(folder, tmp_path, hub.url)
    assert [str(each.target.relative_to(tmp_path / "Model")) for each in pieces] == [
        "transformer/a.safetensors",
        "vae/config.json",
        "model_index.json",
    ]
    for each in pieces:
        assert f"/resolve/{COMMIT}/" in each.url
        hub.files[each.url.removeprefix(hub.url)] = each.target.name.encode()
        fetch(each, nothing)
    assert (tmp_path / "Model" / "vae" / "config.json").read_bytes() == b"config.json"


def test_the_hub_is_what_the_person_set_and_the_mirror_has_the_same_paths(hub: Hub) -> None:
    assert endpoint_of("hub") == hub.url
    assert endpoint_of("mirror") == "https://hf-mirror.com"
    for file in KNOWN_FILES:
        assert file.mirror_url == file.url.replace("https://huggingface.co/", "https://hf-mirror.com/")


def test_what_is_known_has_names_of_its_own_and_is_found_by_them() -> None:
    both = [*KNOWN_FILES, *KNOWN_FOLDERS]
    assert len({(each.folder, each.name) for each in both}) == len(both)
    for each in both:
        assert known(each.folder, each.name) is each
        assert known(each.folder, f"sub/{each.name}") is each
    assert known("vae", "mine.safetensors") is None
