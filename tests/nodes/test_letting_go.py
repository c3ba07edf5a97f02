"""A model that is let go of gives its memory back at once, not when Python looks for circles."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer

from .conftest import cond, empty_latent
from .test_model import ksampler


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("host_device", [True, False])
def test_what_a_model_held_goes_with_it(
    host_device: bool, make_transformer: Callable[..., QwenImageTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenimage_lowvram.nodes.adapters.model import make_model

    detect = Hardware.detect
    monkeypatch.setattr(Hardware, "detect", lambda device: replace(detect(device), host_device=host_device))
    model = make_model(make_transformer(), None)
    image = ksampler(model, cond(), cond(5, 2), empty_latent(), steps=1)
    transformer = model.model.transformer
    store: Any = transformer.store
    buffers = [
        weakref.ref(parameter)
        for index, slot in store._tiers._ready.items()
        for parameter in slot.module_of(store.blocks[index]).parameters()
    ]
    buffers += [weakref.ref(buffer) for buffer in store._tiers._held.values()]
    gone = [*buffers, weakref.ref(transformer), weakref.ref(store)]
    assert len(buffers) > 0
    del model, transformer, store
    assert [ref() for ref in gone if ref() is not None] == []
    assert torch.isfinite(image).all()
