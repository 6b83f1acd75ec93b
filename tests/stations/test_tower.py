"""Station 1: invariants of pruning inside the tower, with FlowCut as its user."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.prepare import LMMParts, Prepared, prepare
from mmlm_efficient.pruning import FlowCut
from mmlm_efficient.tokens import ImageReport
from tests import tiny

I = tiny.IMAGE_TOKEN  # noqa: E741
N = tiny.N_PATCHES


def prepared_images(
    parts: LMMParts, pixels: torch.Tensor, method: FlowCut, per_image: int = N
) -> Prepared:
    """One prompt per image."""
    prompts = [tiny.prompt(1, 5, I, 6, per_image=per_image)] * len(pixels)
    with torch.no_grad():
        return prepare(parts, tiny.batch(prompts, pixels), [method])


def reports(parts: LMMParts, pixels: torch.Tensor, method: FlowCut) -> tuple[ImageReport, ...]:
    return prepared_images(parts, pixels, method).report().images


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [7, 8])
@pytest.mark.parametrize("feature_layer", [-1, -2, 5])
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_counts_and_nesting(tower: str, feature_layer: int, layers: int, attn: str) -> None:
    model = tiny.tiny_llava(tower, layers=layers, feature_layer=feature_layer, attn=attn)
    last = (feature_layer - 1 if feature_layer > 0 else layers + feature_layer) - 1
    with LMMParts(model) as parts:
        assert parts.family.last_cut_layer == last
        pixels = tiny.images(3)
        got = prepared_images(parts, pixels, FlowCut(keep_tokens=(7, 1, 20)))
    for report, tokens, budget in zip(got.report().images, got.tokens, (7, 1, 20), strict=True):
        counts, cut_layer = report.layer_counts, report.cut_layer
        assert len(counts) == layers
        assert counts[0] == N
        assert counts[last + 1 :] == (budget,) * (layers - last - 1)
        for layer in range(last + 1):
            assert budget <= counts[layer + 1] <= counts[layer]
            if (last - layer) % 2:
                assert counts[layer + 1] == counts[layer]
        assert len(tokens) == budget == len(report.kept)
        assert report.kept.tolist() == sorted(set(report.kept.tolist()))
        assert cut_layer is not None
        assert (cut_layer < 0).nonzero().squeeze(1).tolist() == report.kept.tolist()
        for layer, entering in enumerate(counts):
            assert int(((cut_layer < 0) | (cut_layer >= layer)).sum()) == entering
        assert all(0.0 <= ratio <= 1.0 for ratio in report.entropy_ratios)
        assert report.scores is not None
        assert report.scores.shape == (N,)
        assert bool(torch.isfinite(report.scores).all())


@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_an_image_does_not_depend_on_its_batch(tower: str) -> None:
    model = tiny.tiny_llava(tower, layers=8)
    pixels, budgets = tiny.images(5), (7, 30, 12, 36, 3)
    with LMMParts(model) as parts:
        alone = [
            prepared_images(parts, pixels[i : i + 1], FlowCut(keep_tokens=budgets[i]))
            for i in range(5)
        ]
        for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 3, 0], [1, 4]):
            method = FlowCut(keep_tokens=tuple(budgets[i] for i in order))
            together = prepared_images(parts, pixels[order], method)
            for place, image in enumerate(order):
                want, got = alone[image].tokens[0], together.tokens[place]
                assert got.index.tolist() == want.index.tolist()
                torch.testing.assert_close(got.features, want.features, atol=1e-4, rtol=0)
                want_report = alone[image].report().images[0]
                got_report = together.report().images[place]
                if want_report.layer_counts:
                    assert got_report.layer_counts == want_report.layer_counts
                    assert want_report.entropy_ratios == pytest.approx(
                        got_report.entropy_ratios, abs=1e-5
                    )


def test_batches_really_are_ragged() -> None:
    """Guards the test above: its images must not happen to have equal counts."""
    with LMMParts(tiny.tiny_llava(layers=8)) as parts:
        counts = {r.layer_counts for r in reports(parts, tiny.images(5), FlowCut(keep_tokens=7))}
    assert len(counts) > 1


def test_crop_sync_batch_cuts_all_images_alike() -> None:
    with LMMParts(tiny.tiny_llava(layers=8)) as parts:
        method = FlowCut(keep_tokens=7, crop_sync="batch")
        counts = {r.layer_counts for r in reports(parts, tiny.images(5), method)}
    assert len(counts) == 1


def test_rows_before_the_first_cut_are_stock() -> None:
    """The CLS row that leaves layer 0 equals the unpruned one (the first cut is after layer 1)."""
    model = tiny.tiny_llava(layers=8)
    tower = model.model.vision_tower
    pixels = tiny.images(1)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), LMMParts(model) as parts:
        handle = tower.encoder.layers[1].register_forward_pre_hook(
            lambda _, args: seen.append(args[0].clone())
        )
        model.model.get_image_features(pixel_values=pixels)
        prepared_images(parts, pixels, FlowCut(keep_tokens=7))
        handle.remove()
    assert torch.equal(seen[0], seen[1])


def test_sdpa_and_eager_keep_the_same_patches() -> None:
    kept = []
    for attn in ("sdpa", "eager"):
        with LMMParts(tiny.tiny_llava(layers=8, attn=attn)) as parts:
            method = FlowCut(keep_tokens=(4, 9, 14, 19))
            kept.append([r.kept.tolist() for r in reports(parts, tiny.images(4), method)])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("budget", [1, 2, 9, 36, 37])
def test_full_feature_selection_counts_cls(budget: int) -> None:
    """With CLS among the visual tokens the budget is T tokens: CLS and T - 1 patches."""
    model = tiny.tiny_llava("clip", select="full")
    pixels = tiny.images(2)
    with LMMParts(model) as parts, torch.no_grad():
        got = prepared_images(parts, pixels, FlowCut(keep_tokens=budget), per_image=N + 1)
        for report, tokens in zip(got.report().images, got.tokens, strict=True):
            assert len(tokens) == budget
            assert tokens.index[0] == -1
            assert len(report.kept) == budget - 1
            assert report.per_station["tower"] == budget
        logits = model(**got.model_inputs).logits
        assert logits.shape[1] == 3 + budget
        if budget == N + 1:
            inputs = tiny.batch([tiny.prompt(1, 5, I, 6, per_image=N + 1)] * 2, pixels)
            assert torch.equal(logits, model(**inputs).logits)


def test_the_recorded_hidden_state_is_the_cut_one() -> None:
    model = tiny.tiny_llava()
    pixels = tiny.images(1)
    with torch.no_grad():
        # transformers installs its recorders lazily: before our hooks here, after them below.
        model.model.get_image_features(pixel_values=pixels)
        with LMMParts(model) as parts:
            first = prepared_images(parts, pixels, FlowCut(keep_tokens=5))
        model = tiny.tiny_llava()
        with LMMParts(model) as parts:
            second = prepared_images(parts, pixels, FlowCut(keep_tokens=5))
    assert torch.equal(first.tokens[0].features, second.tokens[0].features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_constant_images_in_half_precision(dtype: torch.dtype) -> None:
    model = tiny.tiny_llava(layers=8).to(dtype)
    pixels = torch.ones(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, dtype=dtype)
    pixels[1] = 0
    with LMMParts(model) as parts:
        got = prepared_images(parts, pixels, FlowCut(keep_tokens=7))
    for tokens, report in zip(got.tokens, got.report().images, strict=True):
        assert len(tokens) == 7
        assert bool(torch.isfinite(tokens.features).all())
        assert report.scores is not None
        assert bool(torch.isfinite(report.scores).all())


def test_exact_counts_of_a_thousand_images() -> None:
    """1,000 random images with random budgets: exactly the requested count, every time."""
    model = tiny.tiny_llava(layers=5)
    budgets = torch.randint(1, N + 1, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    with LMMParts(model) as parts:
        for start in range(0, 1000, 50):
            chosen = tuple(budgets[start : start + 50])
            got = prepared_images(parts, tiny.images(50, seed=start), FlowCut(keep_tokens=chosen))
            assert tuple(len(tokens) for tokens in got.tokens) == chosen
            assert tuple(len(report.kept) for report in got.report().images) == chosen
            placeholders = (got.model_inputs["input_ids"] == I).sum(dim=1).tolist()
            assert tuple(placeholders) == chosen


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return output


def test_no_attention_map_and_no_eager_layer() -> None:
    """Under sdpa no tensor has two dimensions of sequence length, and weights never come back."""
    model = tiny.tiny_llava(layers=8)
    weights: list[object] = []
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.register_forward_hook(lambda _, __, out: weights.append(out[1]))
    with LMMParts(model) as parts, Shapes() as shapes:
        got = prepared_images(parts, tiny.images(1), FlowCut(keep_tokens=12))
    lengths = {count + 1 for count in got.report().images[0].layer_counts} | {N}
    lengths -= {tiny.vision_config("clip").hidden_size}
    shapes.seen.discard((1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE))
    maps = [s for s in shapes.seen if sum(size in lengths for size in s) > 1]
    assert not maps
    assert len(weights) == 8
    assert all(weight is None for weight in weights)
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


def test_threads_with_different_budgets_share_a_model() -> None:
    model = tiny.tiny_llava(layers=8)
    pixels = tiny.images(3)
    methods = [
        FlowCut(keep_tokens=7, llm_prune_layer=1, llm_keep_tokens=3),
        FlowCut(keep_tokens=20, llm_prune_layer=0, llm_keep_tokens=11, position_ids="original"),
        FlowCut(keep_ratio=1.0),
    ]
    inputs = tiny.batch([tiny.prompt(1, 5, I, 6)] * 3, pixels)
    failures: list[str] = []
    with LMMParts(model) as parts:

        @torch.no_grad()
        def run(method: FlowCut) -> tuple[torch.Tensor, torch.Tensor]:
            prepared = prepare(parts, inputs, [method])
            with prepared.active():
                logits = model(**prepared.model_inputs).logits
                ids = model.generate(**prepared.model_inputs, max_new_tokens=3, do_sample=False)
            return logits, ids

        want = [run(method) for method in methods]
        barrier = threading.Barrier(len(methods))

        def worker(place: int) -> None:
            barrier.wait()
            for _ in range(8):
                logits, ids = run(methods[place])
                if not torch.equal(logits, want[place][0]) or not torch.equal(ids, want[place][1]):
                    failures.append(methods[place].name)

        threads = [threading.Thread(target=worker, args=(place,)) for place in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("feature_layer", "message"),
    [([-2, -1], r"vision_feature_layer=\[-2, -1\]"), (2, "needs at least layer 2")],
)
def test_feature_layers_that_cannot_be_pruned(feature_layer: Any, message: str) -> None:
    model = tiny.tiny_llava(feature_layer=feature_layer)
    with LMMParts(model) as parts, pytest.raises(SettingsError, match=message):
        prepared_images(parts, tiny.images(1), FlowCut(keep_tokens=4))
