"""Pictures of sinks and attention: places, colours, sizes, and errors in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.plot_grids import MARGIN_PX, PICTURE_PX
from mmlm_efficient.plots import LINE_PX
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning.uniform_pruning import UniformPruning
from mmlm_efficient.sinks.plots import GONE, attention_panel
from mmlm_efficient.sinks.var import VAR
from mmlm_efficient.tokens import (
    CLS_INDEX,
    ImageAttention,
    ImageReport,
    LayerRedistribution,
    PruningReport,
)
from tests import tiny_families

GRID = (3, 4)
N = 12
CELL = PICTURE_PX // 4
LEFT = MARGIN_PX
TOP = MARGIN_PX + 2 * LINE_PX + 2


def entry(layer: int = 2, index: list[int] | None = None, **changes: Any) -> LayerRedistribution:
    tokens = list(range(N)) if index is None else index
    before = torch.zeros(2, len(tokens))
    before[:, 0], before[0, 1] = 0.4, 0.1
    attention = ImageAttention(
        index=torch.tensor(tokens),
        sink=torch.tensor([place == 0 for place in range(len(tokens))]),
        before=before,
        after=before / 4,
    )
    fields: dict[str, Any] = {
        "sample": 0,
        "layer": layer,
        "images": {0: attention},
        "text_sinks": (0,),
        "rows": 3,
        "changed": (1, 2),
        "moved": 0.2,
        "gain": 1.5,
        **changes,
    }
    return LayerRedistribution(**fields)


def report(*layers: LayerRedistribution) -> PruningReport:
    image = ImageReport(0, 0, GRID, N, torch.arange(N), {})
    return PruningReport((image,), redistribution=layers)


PICTURE = Image.new("RGB", (64, 48), (120, 130, 140))


def cell(drawing: Image.Image, column: int, patch: int) -> np.ndarray:
    """The inside of a patch in the picture (0), the map before (1) or after (2)."""
    row, col = divmod(patch, GRID[1])
    left = LEFT + column * (4 * CELL + MARGIN_PX) + col * CELL
    top = TOP + row * CELL
    return np.asarray(drawing)[top + 2 : top + CELL - 2, left + 2 : left + CELL - 2]


def middle(drawing: Image.Image, column: int, patch: int) -> tuple[int, ...]:
    """The colour in the middle of a patch, inside of a ring."""
    pixels = cell(drawing, column, patch)
    return tuple(int(one) for one in pixels[CELL // 2 - 2, CELL // 2 - 2])


def test_rings_are_around_sinks_only() -> None:
    drawn = attention_panel(PICTURE, report(entry()))
    for column in range(3):
        ringed = [
            patch
            for patch in range(N)
            if (cell(drawn, column, patch) == 255).all(axis=-1).any()
            and (cell(drawn, column, patch) == 0).all(axis=-1).any()
        ]
        assert ringed == [0]
    assert middle(drawn, 0, 0) == middle(drawn, 0, 5) == (120, 130, 140)


def test_colours_are_shares_on_a_square_root_scale() -> None:
    from matplotlib import colormaps

    drawn = attention_panel(PICTURE, report(entry()), heads=False)

    def colour(share: float) -> list[int]:
        return [round(255 * part) for part in colormaps["cividis"](share**0.5)[:3]]

    # Mean over the heads: 0.4 and 0.05 before, a quarter of that after; 0.4 is the largest.
    for column, factor in ((1, 1.0), (2, 0.25)):
        for patch, share in ((0, 1.0), (1, 0.125), (7, 0.0)):
            want = colour(share * factor)
            assert np.abs(np.subtract(middle(drawn, column, patch), want)).max() <= 1


def test_tokens_that_are_gone_are_dimmed_and_grey() -> None:
    drawn = attention_panel(PICTURE, report(entry(index=[5, 6, CLS_INDEX])))
    assert middle(drawn, 0, 5) == (120, 130, 140)
    assert max(middle(drawn, 0, 0)) < 60
    assert middle(drawn, 1, 0) == middle(drawn, 2, 0) == GONE
    assert middle(drawn, 1, 5) != GONE


def test_which_layers_are_drawn() -> None:
    layers = [entry(number, changed=(number % 3, 0)) for number in range(2, 9)]
    given = report(*layers)
    one = attention_panel(PICTURE, given, layers=[3]).height
    two = attention_panel(PICTURE, given, layers=[3, 5]).height
    each = two - one
    # Without a choice the four in which most rows changed: 2, 5, 8 and the first of the others.
    assert attention_panel(PICTURE, given).height == one + 3 * each
    by_hand = attention_panel(PICTURE, given, layers=[2, 4, 5, 8])
    assert np.array_equal(np.asarray(attention_panel(PICTURE, given)), np.asarray(by_hand))
    assert attention_panel(PICTURE, given, layers=[3], heads=False).height < one


def test_titles_and_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sinks.png"
    drawn = attention_panel(PICTURE, report(entry()), path, "a title")
    with Image.open(path) as written:
        assert np.array_equal(np.asarray(written), np.asarray(drawn))
    plain = attention_panel(PICTURE, report(entry()))
    assert drawn.height == plain.height + LINE_PX + MARGIN_PX


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (report(), {}, r"VAR\(return_stats=True\)"),
        (report(entry()), {"image": 1}, "image is 1, but the report has 1"),
        (report(entry(4)), {"layers": [4, 9]}, r"layers is \[4, 9\].*: 4"),
        (report(entry(4)), {"layers": []}, r"layers is \[\]"),
        (report(entry()), {"path": "sinks.jpg"}, "must end in '.png'"),
    ],
)
def test_what_is_refused(given: PruningReport, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        attention_panel(PICTURE, given, **options)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
@torch.no_grad()
def test_tiles_frames_and_newlines(family: str) -> None:
    var = VAR(sink_dims=[3], sink_threshold=1.2, first_layer=1, return_stats=True)
    with LMMParts(tiny_families.tiny_model(family)) as parts:
        given = tiny_families.sample_inputs(family, "uneven")
        one = prepare(parts, given, [UniformPruning(keep_ratio=0.5), var])
        with one.active():
            parts.model(**one.model_inputs)
    found = one.report()
    for number, image in enumerate(found.images):
        shown: Any = PICTURE
        if image.places is not None and image.places.video:
            shown = [PICTURE] * len(image.places.shapes)
        drawn = attention_panel(shown, found, image=number)
        assert drawn.width > PICTURE_PX
