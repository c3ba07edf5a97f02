"""Images at places of their own among the rotary positions."""

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from qwenimage_lowvram.engine.errors import InvalidRequest
from qwenimage_lowvram.engine.models.qwen_image.positions import MAX_POSITIONS, place_images

SHAPES = [(1, 6, 8), (1, 5, 7), (1, 9, 2)]


@pytest.fixture(scope="module")
def rope() -> QwenEmbedRope:
    return QwenEmbedRope(10000, [8, 12, 12], scale_rope=True)


def test_images_at_the_centres_of_their_own_frames_lie_where_diffusers_has_them(rope: QwenEmbedRope) -> None:
    wanted, _ = rope([SHAPES], max_txt_seq_len=1, device=torch.device("cpu"))
    assert torch.equal(place_images(rope, SHAPES, [(i, 0, 0) for i in range(3)]), wanted)


def test_a_place_moves_every_position_by_its_frame_and_offsets(rope: QwenEmbedRope) -> None:
    (shape,) = SHAPES[:1]
    centred, moved = (place_images(rope, [shape], [place]) for place in ((0, 0, 0), (-2, 3, 5)))
    steps = rope.neg_freqs[-2], rope.pos_freqs[3], rope.pos_freqs[5]
    turned = torch.cat([steps[0][:4], steps[1][4:10], steps[2][10:]])
    assert (moved - centred * turned).abs().max() < 1e-6


@pytest.mark.parametrize("place", [(0, MAX_POSITIONS, 0), (0, 0, MAX_POSITIONS - 3), (MAX_POSITIONS, 0, 0)])
def test_a_place_beyond_the_tables_is_refused(rope: QwenEmbedRope, place: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidRequest, match="use fewer or smaller images"):
        place_images(rope, SHAPES[:1], [place])
    place_images(rope, SHAPES[:1], [(MAX_POSITIONS - 1, MAX_POSITIONS - 3, MAX_POSITIONS - 4)])
