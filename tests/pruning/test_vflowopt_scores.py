"""VFlowOpt's importance map on hand-computed examples and recorded arrays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning import vflowopt_scores
from mmlm_efficient.pruning.vflowopt_scores import (
    anchors,
    importance,
    patch_entropy,
    received_attention,
    recovered_pixels,
    released_entropy,
    relevance,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "vflowopt"
TOY = torch.tensor(
    [[0.7, 0.1, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4], [0.2, 0.2, 0.3, 0.3]]
)
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "importance.npz") as file:
        arrays: dict[str, np.ndarray[Any, Any]] = dict(file)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def close(got: torch.Tensor, want: torch.Tensor | list[Any], atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want), atol=atol, rtol=0)


def random_attention(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, shape[-1], generator=generator)).softmax(-1)


def grey_patch(levels: torch.Tensor) -> torch.Tensor:
    """One 14x14 image with these 196 grey levels."""
    return levels.to(torch.uint8).view(1, 1, 14, 14).expand(1, 3, 14, 14)


def siglip(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.float() * (1 / 255) - 0.5) / 0.5


@pytest.mark.parametrize(
    ("threshold", "chosen", "fallback", "want"),
    [
        (0.0, [0, 1, 2, 3], False, [0.4, 0.15, 0.225, 0.225]),
        (0.8, [0, 2, 3], False, [1 / 3, 0.4 / 3, 0.8 / 3, 0.8 / 3]),
        (1.0, [0], False, [0.7, 0.1, 0.1, 0.1]),
        (2.0, [0], True, [0.7, 0.1, 0.1, 0.1]),
    ],
)
def test_toy_relevance(
    threshold: float, chosen: list[int], fallback: bool, want: list[float]
) -> None:
    received = received_attention(TOY)
    close(received, [0.4, 0.15, 0.225, 0.225])
    found = anchors(received, threshold)
    assert found.mask.nonzero().flatten().tolist() == chosen
    assert bool(found.fallback) is fallback
    close(relevance(TOY, threshold), want)


def test_toy_importance() -> None:
    entropy = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    close(importance(TOY[None], 1.0, 0.5, entropy), [[0.7160, 0.1436, 0.2184, 0.4220]], 1e-4)


def test_the_comparison_with_the_mean_is_strict_and_a_tied_fallback_takes_the_first() -> None:
    received = torch.tensor([[0.25] * 4, [0.1, 0.4, 0.4, 0.1]])
    found = anchors(received, 1.0)
    assert found.mask.tolist() == [[True, False, False, False], [False, True, True, False]]
    assert found.fallback.tolist() == [True, False]
    assert anchors(received, 1.7).mask[1].tolist() == [False, True, False, False]


def test_threshold_zero_also_takes_tokens_that_receive_nothing() -> None:
    attention = torch.zeros(3, 3)
    attention[:, 1] = 1.0
    assert anchors(received_attention(attention), 0.0).mask.all()
    assert relevance(attention, 0.0).tolist() == received_attention(attention).tolist()


@pytest.mark.parametrize(
    ("levels", "bits", "released"),
    [
        (torch.full((196,), 90), 0.0, 0.0),
        (torch.arange(196) // 98 * 128, 1.0, 0.0),
        (torch.arange(196), math.log2(196), None),
    ],
)
def test_toy_entropy(levels: torch.Tensor, bits: float, released: float | None) -> None:
    pixels = grey_patch(levels)
    close(patch_entropy(pixels, 14), [[bits]], 1e-5)
    if released is not None:
        # float16, in which the wrap of v and v + 128 is exact.
        close(released_entropy(siglip(pixels).half(), 14), [[released]], 1e-5)


def test_grey_is_the_nearest_integer_to_the_mean() -> None:
    """Sums 4, 5 and 6 give grey 1, 2 and 2: shares 1/3 and 2/3."""
    pixels = torch.tensor([[1, 1, 2], [1, 2, 2], [2, 2, 2]], dtype=torch.uint8).T
    want = -(1 / 3) * math.log2(1 / 3) - (2 / 3) * math.log2(2 / 3)
    tripled = pixels.reshape(1, 3, 1, 3).expand(1, 3, 3, 3)
    close(patch_entropy(tripled, 3), [[want]])


def test_patches_are_in_raster_order_and_the_rest_is_unused() -> None:
    pixels = torch.zeros(2, 3, 8, 11, dtype=torch.uint8)
    pixels[1, :, 4, 4:6] = 200
    pixels[:, :, :, 9:] = torch.randint(0, 256, (8, 2), dtype=torch.uint8)
    bits = patch_entropy(pixels, 3)
    assert bits.shape == (2, 6)
    assert (bits[1] > 0).nonzero().flatten().tolist() == [4]
    assert (bits[0] == 0).all()


def test_entropy_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8)
    whole = patch_entropy(pixels, 4)
    monkeypatch.setattr(vflowopt_scores, "_CHUNK_PIXELS", 7 * 16)
    assert patch_entropy(pixels, 4).equal(whole)


def test_recorded_entropies() -> None:
    arrays = golden()
    pixels = arrays["s0_images_u8"].permute(0, 3, 1, 2).to(torch.uint8)
    values = arrays["s0_pixel_values"]
    assert recovered_pixels(values, [0.5] * 3, [0.5] * 3).equal(pixels)
    close(patch_entropy(pixels, 14), arrays["s0_entropy_clean"], 2e-6)
    close(released_entropy(values, 14), arrays["s0_entropy_wrapped"])


@pytest.mark.parametrize("case", range(4))
def test_recorded_importance(case: int) -> None:
    arrays = golden()
    threshold, weight = arrays["configs_t_alpha"][case].tolist()
    attention = arrays["s0_attn"].mean(dim=1)
    received = received_attention(attention)
    close(received, arrays["s0_received"])
    found = anchors(received, threshold)
    assert found.mask.long().equal(arrays[f"s0_c{case}_anchor_mask"])
    assert not found.fallback.any()
    entropy = released_entropy(arrays["s0_pixel_values"], 14)
    close(
        importance(attention, threshold, weight, entropy),
        arrays[f"s0_c{case}_importance"],
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.one_of(st.just(0.0), st.floats(0, 4), st.floats(0, 1e6)),
    st.floats(-1, 1),
    st.floats(0, 60),
    st.booleans(),
)
def test_the_map_is_finite_and_sums_to_one_plus_the_weight(
    seed: int, threshold: float, weight: float, scale: float, flat: bool
) -> None:
    attention = random_attention(2, 9, seed=seed, scale=scale)
    bits = torch.zeros(2, 9) if flat else 7 * torch.rand(2, 9)
    score = importance(attention, threshold, weight, bits)
    assert torch.isfinite(score).all()
    close(score.sum(-1), [1 + weight] * 2, 1e-5)
    plain = importance(attention, threshold, 0.0)
    assert (plain >= 0).all()
    close(plain.sum(-1), [1.0, 1.0], 1e-5)


def test_crops_do_not_influence_each_other() -> None:
    attention = random_attention(5, 16)
    bits = torch.rand(5, 16)
    alone = [importance(attention[i : i + 1], 1.5, 0.3, bits[i : i + 1]) for i in range(5)]
    assert importance(attention, 1.5, 0.3, bits).equal(torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_scored_in_float32(dtype: torch.dtype) -> None:
    attention = random_attention(2, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = importance(attention, 1.2, 0.0)
    assert score.dtype == torch.float32
    close(score, importance(attention.float(), 1.2, 0.0), 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("mean", "std"), [([0.5] * 3, [0.5] * 3), (CLIP_MEAN, CLIP_STD)])
def test_every_pixel_value_is_recovered(
    dtype: torch.dtype, mean: list[float], std: list[float]
) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    offset, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    values = ((pixels.float() / 255 - offset) / scale).to(dtype)
    assert recovered_pixels(values, mean, std).equal(pixels)
    assert recovered_pixels(values * 10, mean, std)[..., -1, -1].eq(255).all()


@pytest.mark.parametrize(
    ("mean", "std", "off"),
    [
        ([0.5] * 3, [0.5] * 3, 0),
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 0),
        (CLIP_MEAN, CLIP_STD, 1),
    ],
)
def test_bfloat16_pixels_are_recovered_but_for_one_level(
    mean: list[float], std: list[float], off: int
) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    offset, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    values = ((pixels.float() / 255 - offset) / scale).bfloat16()
    error = (recovered_pixels(values, mean, std).int() - pixels.int()).abs()
    assert error.sum() == off
    assert error[:, :2].eq(0).all()  # of blue, where it is
    assert values[error > 0].ge(2).all()


def test_bad_input_is_refused() -> None:
    rgb = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for threshold in (-0.1, math.nan, math.inf):
        with pytest.raises(SettingsError, match="anchor_threshold is"):
            relevance(TOY, threshold)
    for weight in (1.1, math.nan):
        with pytest.raises(SettingsError, match="must be in \\[-1, 1\\]"):
            importance(TOY[None], 1.0, weight, torch.zeros(1, 4))
    with pytest.raises(SettingsError, match="got none"):
        importance(TOY[None], 1.0, 0.5)
    with pytest.raises(SettingsError, match=r"got shape \(1, 5\)"):
        importance(TOY[None], 1.0, 0.5, torch.zeros(1, 5))
    with pytest.raises(SettingsError, match="uint8 pixels, got torch.float32"):
        patch_entropy(rgb.float(), 4)
    with pytest.raises(SettingsError, match="floating point input, got torch.uint8"):
        released_entropy(rgb, 4)
    for patch_px in (0, 9):
        with pytest.raises(SettingsError, match=r"must be in 1\.\.8"):
            patch_entropy(rgb, patch_px)
    with pytest.raises(SettingsError, match=r"got \(3, 8, 8\)"):
        patch_entropy(rgb[0], 4)
    with pytest.raises(SettingsError, match="image_mean has 1 and image_std 3"):
        recovered_pixels(rgb.float(), [0.5], [0.5] * 3)
