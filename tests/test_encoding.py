"""Station 1: what is computed once, and what only when somebody asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmlm_efficient.encoding import encode
from mmlm_efficient.families import Family
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning import FlowCut, RandomPruning, VFlowOpt, VisionZip
from tests import tiny_families as tiny
from tests.tiny_vflowopt import STATS

METHODS = {
    "none": [],
    "flowcut": [FlowCut(keep_tokens=4)],
    "visionzip": [VisionZip(keep_tokens=4)],
    "two": [FlowCut(keep_tokens=6), RandomPruning(keep_tokens=3)],
    "map": [VFlowOpt(keep_ratio=0.5, profile="none", entropy_weight=0.0)],
}
ENTROPY = VFlowOpt(keep_ratio=0.5, profile="none", entropy_weight=0.5)


class Calls:
    """Counts the calls of a family's method."""

    def __init__(self, family: Family, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.own = 0, getattr(family, name)
        monkeypatch.setattr(family, name, self)

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        return self.own(*args)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_images_are_laid_out_once_and_pixels_left_alone(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny.sample_inputs(family, "several")
    with torch.no_grad(), LMMParts(tiny.tiny_model(family), STATS) as parts:
        visuals = Calls(parts.family, "visuals", monkeypatch)
        pixels = Calls(parts.family, "crop_pixels", monkeypatch)
        run_tower = parts.family.run_tower

        def uncounted(*args: Any) -> Any:
            before = pixels.count
            rows = run_tower(*args)  # takes the pixels, too
            pixels.count = before
            return rows

        monkeypatch.setattr(parts.family, "run_tower", uncounted)
        prepare(parts, inputs, METHODS[name])
    assert visuals.count == 1
    assert pixels.count == (1 if name == "two" else 0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pixels_outlive_the_request_that_was_encoded(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny.sample_inputs(family, "uneven")
    with torch.no_grad(), LMMParts(tiny.tiny_model(family), STATS) as parts:
        want = [
            one.clone() for one in parts.family.crop_pixels(inputs, parts.family.visuals(inputs))
        ]
        given = dict(inputs)
        encoded = encode(parts, given, VFlowOpt.observes)
        for name in parts.family.consumed:
            given.pop(name, None)
        pixels = Calls(parts.family, "crop_pixels", monkeypatch)
        for image in (2, 0, 1):
            assert encoded.pixels[image]().equal(want[image])
        assert pixels.count == 1
        turned = encoded.take([1, 1, 0])
        assert [
            one().equal(want[image]) for one, image in zip(turned.pixels, (1, 1, 0), strict=True)
        ]
        text = {key: inputs[key] for key in inputs if key not in parts.family.consumed}
        got = prepare(parts, text, [ENTROPY], encoded=encoded)
        fresh = prepare(parts, inputs, [ENTROPY])
        for one, other in zip(got.tokens, fresh.tokens, strict=True):
            assert one.index.equal(other.index)
