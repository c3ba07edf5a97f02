"""What stands on a chart is not cut off."""

import pytest
from qwenimage_lowvram.engine.reports.charts import MARGIN_PX, WIDTH_PX, draw_cards


@pytest.mark.parametrize("length", [0, 20, 200])
def test_a_line_of_any_length_ends_before_the_margin(length: int) -> None:
    image = draw_cards("Memory plan", "x" * length, [])
    line = image.crop((WIDTH_PX - MARGIN_PX, 46, WIDTH_PX, 76))
    assert line.getextrema() == ((255, 255),) * 3
    assert (image.crop((MARGIN_PX, 46, WIDTH_PX, 76)).getextrema() == ((255, 255),) * 3) == (length == 0)
