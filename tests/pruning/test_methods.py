"""What the methods keep, through `prepare`; and which of them go together."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch

from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.prepare import LMMParts, Prepared, prepare
from mmlm_efficient.pruning import (
    FlowCut,
    KeepMask,
    NoPruning,
    PruningMethod,
    RandomPruning,
    UniformPruning,
)
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.pruning.flowcut import calibrate_static_schedule
from mmlm_efficient.pruning.uniform_pruning import even_grid
from mmlm_efficient.tokens import TokenPlaces, VisualTokens
from tests import tiny

I = tiny.IMAGE_TOKEN  # noqa: E741
N, G = tiny.N_PATCHES, tiny.GRID


@pytest.fixture(scope="module")
def parts() -> LMMParts:
    return LMMParts(tiny.tiny_llava(layers=8))


def run(parts: LMMParts, methods: list[Method], pixels: torch.Tensor | None = None) -> Prepared:
    """One prompt per image; two images unless given."""
    pixels = tiny.images(2) if pixels is None else pixels
    prompts = [tiny.prompt(1, 5, I, 6)] * len(pixels)
    with torch.no_grad():
        return prepare(parts, tiny.batch(prompts, pixels), methods)


def kept(parts: LMMParts, method: Method, pixels: torch.Tensor | None = None) -> list[list[int]]:
    return [report.kept.tolist() for report in run(parts, [method], pixels).report().images]


# Mean and deviation of the usual image processors.
NORMALISED: dict[str, tuple[list[float], list[float]]] = {
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


def chosen_at_random(pixels: torch.Tensor) -> list[int]:
    tokens = VisualTokens(torch.zeros(N, 4), torch.arange(N), TokenPlaces.grid(G, G), image=0)
    return RandomPruning(keep_tokens=12).select(tokens, 12, pixels).tolist()


class TestRandom:
    def test_seed_and_image_fix_the_choice(self, parts: LMMParts) -> None:
        first = kept(parts, RandomPruning(keep_tokens=9, seed=1))
        assert first == kept(parts, RandomPruning(keep_tokens=9, seed=1))
        assert first != kept(parts, RandomPruning(keep_tokens=9, seed=2))
        assert first[0] != first[1]
        swapped = kept(parts, RandomPruning(keep_tokens=9, seed=1), tiny.images(2).flip(0))
        assert swapped == first[::-1]

    @pytest.mark.parametrize("normalised", [*NORMALISED])
    def test_every_dtype_gives_the_same_choice(self, normalised: str) -> None:
        """For 8-bit pictures; their levels differ between the dtypes, the order does not."""
        mean, std = (torch.tensor(one).view(3, 1, 1) for one in NORMALISED[normalised])
        rng = np.random.default_rng(5)
        every = np.arange(256).repeat(3).reshape(3, 16, 16)
        for picture in (rng.integers(0, 256, (3, 64, 64)), rng.integers(90, 99, (3, 9, 9)), every):
            pixels = ((torch.from_numpy(picture) / 255.0 - mean) / std).float()
            chosen = [
                chosen_at_random(pixels.to(dtype))
                for dtype in (torch.float32, torch.bfloat16, torch.float16)
            ]
            assert chosen[0] == chosen[1] == chosen[2]

    def test_any_pixels_agree_in_float32_and_bfloat16(self) -> None:
        for pixels in tiny.images(20, seed=8):
            assert chosen_at_random(pixels) == chosen_at_random(pixels.bfloat16())
        pixels[0, 0, 0] = torch.nan
        assert len(chosen_at_random(pixels)) == 12

    def test_a_model_in_bfloat16_keeps_the_same(self, parts: LMMParts) -> None:
        method, pixels = RandomPruning(keep_tokens=9), tiny.images(2)
        with LMMParts(tiny.tiny_llava(layers=8).bfloat16()) as half:
            assert kept(half, method, pixels.bfloat16()) == kept(parts, method, pixels)

    def test_similar_pictures_differ(self) -> None:
        picture = tiny.images(1)[0]
        other = picture.clone()
        other[1, 2, 3] += 0.1
        assert chosen_at_random(picture) != chosen_at_random(other)

    def test_a_larger_budget_keeps_a_superset(self, parts: LMMParts) -> None:
        small, large = (kept(parts, RandomPruning(keep_tokens=n)) for n in (5, 20))
        assert all(set(a) < set(b) for a, b in zip(small, large, strict=True))

    def test_it_is_spread_over_the_image(self, parts: LMMParts) -> None:
        counts = np.zeros(N)
        for seed in range(40):
            for indices in kept(parts, RandomPruning(keep_tokens=9, seed=seed)):
                counts[indices] += 1
        assert counts.sum() == 80 * 9
        assert counts.min() > 5
        assert counts.max() < 40


class TestUniform:
    @pytest.mark.parametrize(
        ("rows", "cols"), [(6, 6), (24, 24), (3, 10), (10, 3), (1, 7), (12, 12)]
    )
    def test_exact_distinct_and_even(self, rows: int, cols: int) -> None:
        for count in range(1, rows * cols + 1):
            indices = even_grid(rows, cols, count)
            assert indices.tolist() == sorted(set(indices.tolist()))
            assert len(indices) == count
            assert int(indices[0]) >= 0
            assert int(indices[-1]) < rows * cols
            per_row = torch.bincount(indices // cols, minlength=rows)
            used = per_row[per_row > 0]
            assert int(used.max() - used.min()) <= 1

    def test_a_quarter_of_a_square(self) -> None:
        assert even_grid(4, 4, 4).tolist() == [5, 7, 13, 15]
        assert even_grid(6, 6, 36).tolist() == list(range(36))
        assert even_grid(5, 5, 1).tolist() == [12]

    def test_after_a_tower_method_every_nth_token(self, parts: LMMParts) -> None:
        cut = run(parts, [FlowCut(keep_tokens=12)]).report().images
        both = run(parts, [FlowCut(keep_tokens=12), UniformPruning(keep_ratio=0.5)]).report().images
        for one, two in zip(cut, both, strict=True):
            assert two.kept.tolist() == one.kept[1::2].tolist()
            assert dict(two.per_station) == {"tower": 12, "bridge": 6, "layer": 6}


class TestKeepMask:
    WANTED: ClassVar[list[int]] = [1, 7, 8, 20]

    @pytest.mark.parametrize("shape", [(N,), (G, G)])
    @pytest.mark.parametrize("kind", ["numpy", "torch", "list"])
    def test_masks(self, parts: LMMParts, kind: str, shape: tuple[int, ...]) -> None:
        mask: Any = np.zeros(N, dtype=bool)
        mask[self.WANTED] = True
        mask = mask.reshape(shape)
        if kind == "torch":
            mask = torch.from_numpy(mask)
        elif kind == "list":
            mask = mask.tolist()
        assert kept(parts, KeepMask(mask=mask)) == [self.WANTED] * 2

    @pytest.mark.parametrize(
        "mask", [[8, 20, 1, 7], (1, 7, 8, 20), np.array([20, 8, 7, 1]), torch.tensor([1, 7, 20, 8])]
    )
    def test_indices(self, parts: LMMParts, mask: Any) -> None:
        assert kept(parts, KeepMask(mask=mask)) == [self.WANTED] * 2

    @pytest.mark.parametrize(
        "mask",
        [
            [[1, 2, 3], [5]],
            [torch.tensor([1, 2, 3]), np.array([5])],
            [np.isin(np.arange(N), [1, 2, 3]), np.isin(np.arange(N).reshape(G, G), [5])],
            np.stack([np.isin(np.arange(N).reshape(G, G), wanted) for wanted in ([1, 2, 3], [5])]),
        ],
    )
    def test_one_per_image(self, parts: LMMParts, mask: Any) -> None:
        assert kept(parts, KeepMask(mask=mask)) == [[1, 2, 3], [5]]

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            ([], "got list"),
            ("all", "got str"),
            ([False, False], "keeps nothing"),
            ([1, 1], "distinct"),
            ([-1, 4], "not negative"),
            ([0.5, 1.0], "booleans"),
            (np.zeros((2, 2)), "booleans"),
            (np.zeros((2, 2, 2, 2), dtype=bool), "booleans"),
        ],
    )
    def test_refused_when_built(self, mask: Any, message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            KeepMask(mask=mask)

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (np.ones((4, 9), dtype=bool), r"shape \[4, 9\], but the image has 6 x 6"),
            (np.eye(5, dtype=bool), r"shape \[5, 5\]"),
            ([3, 36], "names patch 36, but the image has patches 0 to 35"),
            ([[1], [2], [3]], "mask has 3 values, but the call has 2"),
        ],
    )
    def test_refused_for_an_image(self, parts: LMMParts, mask: Any, message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            run(parts, [KeepMask(mask=mask)])

    def test_nothing_in_common_with_an_earlier_station(self, parts: LMMParts) -> None:
        gone = run(parts, [FlowCut(keep_tokens=5)]).report().images[0]
        dropped = sorted(set(range(N)) - set(gone.kept.tolist()))
        with pytest.raises(SettingsError, match="keeps none of the tokens"):
            run(parts, [FlowCut(keep_tokens=5), KeepMask(mask=dropped)], tiny.images(2)[:1])

    def test_with_cls_among_the_tokens(self) -> None:
        with LMMParts(tiny.tiny_llava(select="full")) as parts, torch.no_grad():
            inputs = tiny.batch([tiny.prompt(1, I, 5, per_image=N + 1)], tiny.images(1))
            for wanted in (self.WANTED, [3], list(range(N))):
                prepared = prepare(parts, inputs, [KeepMask(mask=wanted)])
                assert prepared.tokens[0].index.tolist() == [-1, *wanted]
                assert prepared.report().images[0].kept.tolist() == wanted
            for budget in (1, 2, 36):
                for method in (UniformPruning, RandomPruning):
                    prepared = prepare(parts, inputs, [method(keep_tokens=budget)])
                    assert len(prepared.tokens[0]) == budget
                    assert prepared.tokens[0].index[0] == -1


class TestFlowCut:
    def test_static_schedule(self, parts: LMMParts) -> None:
        counts = (30, 21, 9)
        method = FlowCut(keep_tokens=9, schedule="static", counts=counts)
        for report in run(parts, [method]).report().images:
            # 8 layers, feature layer 6: cuts after 1, 3 and 5.
            assert report.layer_counts == (36, 36, 30, 30, 21, 21, 9, 9)
            assert report.entropy_ratios == ()

    @pytest.mark.parametrize(
        ("counts", "message"),
        [((9,), r"1 values, .*\[1, 3, 5\]"), ((30, 20, 10), "counts ends with 10, but the budget")],
    )
    def test_static_counts_that_do_not_fit(
        self, parts: LMMParts, counts: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(SettingsError, match=message):
            run(parts, [FlowCut(keep_tokens=9, schedule="static", counts=counts)])

    def test_calibrated_counts_are_the_means(self, parts: LMMParts) -> None:
        pixels, method = tiny.images(6, seed=3), FlowCut(keep_tokens=9)
        counts = calibrate_static_schedule(parts, pixels, method)
        layer_counts = torch.tensor(
            [report.layer_counts for report in run(parts, [method], pixels).report().images]
        ).float()
        assert list(counts) == [round(float(layer_counts[:, c].mean())) for c in (2, 4, 6)]
        static = FlowCut(keep_tokens=9, schedule="static", counts=counts)
        assert all(len(indices) == 9 for indices in kept(parts, static, pixels))
        for wrong in (static, FlowCut(keep_tokens=(9,) * 5 + (8,)), FlowCut(keep_tokens=36)):
            with pytest.raises(SettingsError, match="calibration needs"):
                calibrate_static_schedule(parts, pixels, wrong)

    def test_interval_and_start_layer(self, parts: LMMParts) -> None:
        pixels = tiny.images(4)
        for interval, start, allowed in (
            (1, 0, range(6)),
            (3, 0, (2, 5)),
            (2, 2, (3, 5)),
            (9, 5, (5,)),
        ):
            method = FlowCut(keep_tokens=4, prune_interval=interval, prune_start_layer=start)
            for report in run(parts, [method], pixels).report().images:
                assert report.cut_layer is not None
                assert set(report.cut_layer.tolist()) <= {-1, *allowed}
                assert len(report.kept) == 4
        with pytest.raises(SettingsError, match="prune_start_layer=6, .*give 0 to 5"):
            run(parts, [FlowCut(keep_tokens=4, prune_start_layer=6)])

    @pytest.mark.parametrize(
        "settings",
        [
            {"score_terms": ("attention",)},
            {"score_terms": ("semantic",)},
            {"score_terms": ("value_norm",)},
            {"score_terms": ("attention", "value_norm")},
            {"score_momentum": 0.0},
            {"relay": "mean"},
        ],
    )
    def test_options_change_the_choice_but_not_the_count(
        self, parts: LMMParts, settings: dict[str, Any]
    ) -> None:
        pixels = tiny.images(4)
        usual = kept(parts, FlowCut(keep_tokens=9), pixels)
        other = kept(parts, FlowCut(keep_tokens=9, **settings), pixels)
        assert all(len(indices) == 9 for indices in other)
        assert other != usual

    def test_relay_cls_needs_a_cls_token(self) -> None:
        with LMMParts(tiny.tiny_llava("siglip")) as siglip:
            with pytest.raises(SettingsError, match="no CLS token"):
                run(siglip, [FlowCut(keep_tokens=9, relay="cls")])
            assert kept(siglip, FlowCut(keep_tokens=9)) == kept(
                siglip, FlowCut(keep_tokens=9, relay="mean")
            )

    def test_llm_layer_and_targets(self, parts: LMMParts) -> None:
        with pytest.raises(
            SettingsError, match="llm_prune_layer=4, .*has 4 layers: give at most 3"
        ):
            run(parts, [FlowCut(keep_tokens=9, llm_prune_layer=4, llm_keep_tokens=2)])
        with pytest.raises(SettingsError, match="llm_keep_tokens has 3 values"):
            run(parts, [FlowCut(keep_tokens=9, llm_prune_layer=1, llm_keep_tokens=(2, 3, 4))])

    def test_report_of_both_stages(self, parts: LMMParts) -> None:
        method = FlowCut(keep_tokens=(9, 7), llm_prune_layer=1, llm_keep_tokens=(4, 7))
        prepared = run(parts, [method])
        with torch.no_grad(), prepared.active():
            parts.model(**prepared.model_inputs)
        report = prepared.report()
        assert report.methods == ("flowcut",)
        assert set(report.seconds) == {"tower_s", "prune_s"}
        assert report.seconds["tower_s"] > report.seconds["prune_s"] / 2 > 0
        one, two = report.images
        assert one.decoder_layer_tokens == (9, 9, 4, 4)
        assert two.decoder_layer_tokens == (7, 7, 7, 7)
        assert dict(one.per_station) == {"tower": 9, "bridge": 9, "layer": 4}
        assert set(one.kept.tolist()) < set(prepared.tokens[0].index.tolist())
        assert two.kept.tolist() == prepared.tokens[1].index.tolist()
        assert (one.image, one.sample, two.image, two.sample) == (0, 0, 1, 1)

    def test_equal_scores_keep_the_first_patches(self) -> None:
        model = tiny.tiny_llava(layers=8)
        with torch.no_grad():
            for layer in model.model.vision_tower.encoder.layers:
                layer.self_attn.v_proj.weight.zero_()
                layer.self_attn.v_proj.bias.zero_()
        with LMMParts(model) as parts:
            assert kept(parts, FlowCut(keep_tokens=5)) == [[0, 1, 2, 3, 4]] * 2


class TestComposition:
    def test_two_owners_of_a_station(self, parts: LMMParts) -> None:
        for pair, station in (
            ([RandomPruning(keep_tokens=4), UniformPruning(keep_tokens=4)], "bridge"),
            ([FlowCut(keep_tokens=4), FlowCut(keep_tokens=8)], "tower"),
        ):
            names = f"'{pair[0].name}' and '{pair[1].name}' both decide .*the {station} station"
            with pytest.raises(SettingsError, match=names):
                run(parts, list(pair))

    def test_two_position_rules(self, parts: LMMParts) -> None:
        methods: list[Method] = [
            FlowCut(keep_tokens=8),
            RandomPruning(keep_tokens=4, position_ids="original"),
        ]
        with pytest.raises(SettingsError, match="'flowcut' has position_ids='auto' and 'random'"):
            run(parts, methods)

    def test_tower_and_bridge_go_together(self, parts: LMMParts) -> None:
        got = run(parts, [NoPruning(), FlowCut(keep_tokens=20), RandomPruning(keep_tokens=6)])
        assert [dict(report.per_station) for report in got.report().images] == [
            {"tower": 20, "bridge": 6, "layer": 6}
        ] * 2

    def test_a_method_that_does_not_know_the_family(self, parts: LMMParts) -> None:
        class Elsewhere(PruningMethod):
            name: ClassVar[str] = "elsewhere"
            families: ClassVar[tuple[str, ...] | Literal["all"]] = ("qwen_vl", "video")

        with pytest.raises(UnsupportedError, match="'elsewhere'.*'llava'.*qwen_vl, video"):
            run(parts, [Elsewhere(keep_tokens=3)])

    def test_padding_side(self, parts: LMMParts) -> None:
        inputs = tiny.batch([tiny.prompt(1, I, 5)], tiny.images(1))
        side: Any = "top"
        with pytest.raises(SettingsError, match="padding_side"):
            prepare(parts, inputs, padding_side=side)

    def test_without_an_attention_mask(self, parts: LMMParts) -> None:
        inputs = tiny.batch([tiny.prompt(1, I, 5)], tiny.images(1))
        with_mask = prepare(parts, inputs, [UniformPruning(keep_tokens=4)]).model_inputs
        del inputs["attention_mask"]
        without = prepare(parts, inputs, [UniformPruning(keep_tokens=4)]).model_inputs
        assert torch.equal(with_mask["input_ids"], without["input_ids"])
        assert torch.equal(with_mask["attention_mask"], without["attention_mask"])
