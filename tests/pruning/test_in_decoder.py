"""FastV, PyramidDrop and SparseVLM against the model's own eager attention and hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlm_efficient import EfficientLMM
from mmlm_efficient.errors import PromptError, SettingsError
from mmlm_efficient.prepare import LMMParts, Prepared, prepare
from mmlm_efficient.pruning import FastV, FlowCut, PruningMethod, PyramidDrop, SparseVLM
from mmlm_efficient.pruning.base import LayerJob
from mmlm_efficient.pruning.decoder_ranking import prompt_attention
from mmlm_efficient.stations.bridge import Block
from mmlm_efficient.stations.layer import LayerRequest
from mmlm_efficient.stations.layer_rows import LayerCut, SampleRows
from tests import tiny
from tests.tiny_processor import tiny_processor

I = tiny.IMAGE_TOKEN  # noqa: E741
N = tiny.N_PATCHES
# One image, none, two images with text between; padded on the left.
PROMPTS = [
    tiny.prompt(1, 5, 12, I, 6, 7, 21, 22, 23, 24),
    tiny.prompt(1, 9, 11),
    tiny.prompt(1, 5, I, 6, 7, 8, I, 9, 10, 31),
]
IMAGES_OF = ((0,), (), (1, 2))
METHODS: dict[str, PruningMethod] = {
    "fastv": FastV(keep_tokens=(4, 9, 15)),
    "fastv at 3": FastV(keep_ratio=(0.1, 0.5, 0.9), layer=3),
    "pyramiddrop": PyramidDrop(keep_tokens=(4, 9, 15)),
    "pyramiddrop in two": PyramidDrop(keep_ratio=0.2, stage_layers=(1, 3)),
    "sparsevlm": SparseVLM(keep_tokens=(9, 12, 4)),
    "sparsevlm in steps": SparseVLM(stage_keep_tokens=(5, 4, 2)),
    "sparsevlm, nothing merged": SparseVLM(keep_ratio=0.3, recycle=False),
}


def cuts_of(method: PruningMethod, base: Prepared, seen: list[dict[int, Tensor]]) -> list[LayerCut]:
    """A method's cuts; at each of them the scores of every image are noted."""
    n_layers = len(base.parts.family.decoder.layers)
    samples = tuple(s for s, images in enumerate(IMAGES_OF) for _ in images)
    job = LayerJob(
        tokens=base.tokens,
        stock=base.stock_tokens,
        samples=samples,
        n_layers=n_layers,
        identity=base.parts.identity,
    )

    def noting(cut: LayerCut, scores: dict[int, Tensor]) -> LayerCut:
        def score(rows: SampleRows, columns: Tensor) -> Tensor:
            assert cut.score is not None
            scores[rows.block.image] = cut.score(rows, columns)
            return scores[rows.block.image]

        return replace(cut, score=score)

    cuts = method.layer_cuts(job)
    seen.extend({} for _ in cuts)
    return [noting(cut, scores) for cut, scores in zip(cuts, seen, strict=True)]


def eager(base: Prepared, cuts: Sequence[LayerCut], compact: bool = True) -> tuple[Any, Any]:
    """The model's outputs under some cuts, with attentions and hidden states."""
    request = LayerRequest(base.layout, cuts, compact=compact, gaps=False)
    with base.parts.layer.active(request):
        output = base.parts.model(
            **base.model_inputs, output_attentions=True, output_hidden_states=True
        )
    return output, request


def blocks_of(request: LayerRequest) -> list[tuple[int, Block]]:
    """(prompt, block) of every image, as the request has left them."""
    return [(s, block) for s, blocks in enumerate(request.layout.blocks) for block in blocks]


def largest(values: Tensor, count: int) -> list[int]:
    """Positions of the largest values, by Python's own sort."""
    order = sorted(range(len(values)), key=lambda place: (-float(values[place]), place))
    return sorted(order[:count])


def embedded(base: Prepared, sample: int) -> Tensor:
    """The decoder's input rows of one prompt."""
    ids = base.model_inputs["input_ids"][sample]
    rows = base.parts.model.get_input_embeddings()(ids).clone()
    for block in base.layout.blocks[sample]:
        rows[block.start : block.stop] = base.tokens[block.image].features
    return rows


def raters(base: Prepared, sample: int, block: Block) -> list[int]:
    """Which of a prompt's text tokens rate an image, computed one by one."""
    rows, text = embedded(base, sample), base.layout.text(sample).tolist()
    behind = [number for number, column in enumerate(text) if column >= block.stop]
    share = torch.zeros(len(behind))
    for visual in range(block.start, block.stop):
        dots = torch.stack([(rows[visual] * rows[text[number]]).sum() for number in behind])
        share += torch.softmax(dots, 0) / len(block)
    return [number for number, own in zip(behind, share, strict=True) if own > share.mean()]


@pytest.mark.parametrize("text", tiny.TEXTS)
@pytest.mark.parametrize("name", METHODS)
def test_scores_are_the_models_own_attention(name: str, text: str) -> None:
    """Every cut's scores, from an eager run in which only the cuts before it are made."""
    model, method = tiny.tiny_llava("clip", text, attn="eager"), METHODS[name]
    compact = method.layer_positions(axes=False) == "compact"
    with torch.no_grad(), LMMParts(model) as parts:
        base = prepare(parts, tiny.batch(PROMPTS, tiny.images(3)))
        seen: list[dict[int, Tensor]] = []
        cuts = cuts_of(method, base, seen)
        _, request = eager(base, cuts, compact)
        seen = [dict(scores) for scores in seen]
        assert request.scored_layers == [cut.layer for cut in cuts]
        for number, (cut, scores) in enumerate(zip(cuts, seen, strict=True)):
            output, before = eager(base, cuts[:number], compact)
            # PyramidDrop ranks with the attention of the layer whose input it cuts.
            ranking = cut.layer + int(isinstance(method, PyramidDrop))
            attention = output.attentions[ranking].mean(dim=1)
            uncut = [block for blocks in base.layout.blocks for block in blocks]
            for (sample, block), whole in zip(blocks_of(before), uncut, strict=True):
                queries = [-1]
                if isinstance(method, SparseVLM):
                    asking = raters(base, sample, whole)
                    queries = before.layout.text(sample)[asking].tolist()
                    assert 0 < len(queries) < base.layout.mask.shape[1] - whole.stop
                want = attention[sample, queries, block.start : block.stop].mean(dim=0)
                got = scores[block.image]
                torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
                target = cut.targets[block.image]
                _, after = eager(base, cuts[: number + 1], compact)
                kept = after.kept[block.image]
                earlier = before.kept.get(block.image, torch.arange(N))
                assert earlier[largest(want, target)].tolist() == kept[:target].tolist()


@pytest.mark.parametrize("name", METHODS)
def test_prepare_runs_the_same_cuts(name: str) -> None:
    """`prepare` gives the cuts, their positions and the scored layers of the method."""
    model, method = tiny.tiny_llava(), METHODS[name]
    with torch.no_grad(), LMMParts(model) as parts:
        inputs = tiny.batch(PROMPTS, tiny.images(3))
        base, prepared = prepare(parts, inputs), prepare(parts, inputs, [method])
        compact = not isinstance(method, FastV)
        cuts = cuts_of(method, base, [])
        request = LayerRequest(base.layout, cuts, compact=compact, gaps=False)
        with parts.layer.active(request):
            want = model(**base.model_inputs).logits
        with prepared.active():
            got = model(**prepared.model_inputs).logits
    assert torch.equal(got, want)
    own = prepared._request
    assert own is not None
    assert own.scored_layers == [cut.layer for cut in cuts]
    assert own.cut_layers == [cut.layer for cut in cuts]


# SparseVLM's merged tokens


def peaks(rows: Tensor, count: int) -> list[list[int]]:
    """Density peaks one token at a time: members of each cluster, the centre first."""
    size, width = rows.shape
    gap = [[float((a - b).norm()) / math.sqrt(width) for b in rows] for a in rows]
    nearest = [sorted(own)[:count] for own in gap]
    density = [math.exp(-sum(d * d for d in own) / count) for own in nearest]
    peak = []
    for one in range(size):
        denser = [gap[one][i] for i in range(size) if density[i] > density[one]]
        peak.append(density[one] * (min(denser) if denser else max(map(max, gap))))
    centres = sorted(range(size), key=lambda one: (-peak[one], one))[:count]
    groups = [[centre] for centre in centres]
    for one in range(size):
        if one not in centres:
            nearest_centre = min(range(count), key=lambda c: (gap[one][centres[c]], c))
            groups[nearest_centre].append(one)
    return groups


def test_recycled_tokens_equal_an_independent_computation() -> None:
    """Of 36 tokens 4 stay, 10 of the 32 others become 2; then 1 of 3 and 1 of 2 at the next cuts.

    Values, order and provenance are followed through all three cuts.
    """
    # Small states: with the large ones of the tiny model all densities underflow to 0.
    model = tiny.tiny_llava(attn="eager")
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.mlp.down_proj.weight.mul_(0.1)
            layer.self_attn.o_proj.weight.mul_(0.1)
    method = SparseVLM(stage_keep_tokens=(4, 3, 2))
    entering: dict[int, Tensor] = {}
    with torch.no_grad(), LMMParts(model) as parts:
        inputs = tiny.batch(PROMPTS, tiny.images(3))
        base, prepared = prepare(parts, inputs), prepare(parts, inputs, [method])
        seen: list[dict[int, Tensor]] = []
        cuts = cuts_of(method, base, seen)
        for number, module in enumerate(model.model.language_model.layers):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, number=number: entering.update({number: args[0].clone()}),
                with_kwargs=True,
            )
        _, request = eager(base, cuts)
        states = dict(entering)
        scores = [dict(own) for own in seen]
        stands_for = {image: [{patch} for patch in range(N)] for image in range(3)}
        carriers = {image: list(range(N)) for image in range(3)}
        for number, cut in enumerate(cuts):
            # The layer's whole output: that of a run without this cut.
            _, before = eager(base, cuts[:number])
            whole = entering[cut.layer + 1]
            _, after = eager(base, cuts[: number + 1])
            for (sample, old), (_, new) in zip(blocks_of(before), blocks_of(after), strict=True):
                image, target = old.image, cut.targets[old.image]
                score, rows = scores[number][image], whole[sample, old.start : old.stop]
                keep = largest(score, target)
                dropped = [place for place in range(len(old)) if place not in keep]
                recycled = int(0.3 * len(dropped)) + 1
                best = [dropped[i] for i in largest(score[dropped], recycled)]
                groups = [[best[i] for i in g] for g in peaks(rows[best], recycled // 10 + 1)]
                assert len(groups) == (2, 1, 1)[number]
                merged = [rows[g].sum(dim=0) / (len(g) + 1e-6) for g in groups]
                want = torch.stack([*rows[keep], *merged])
                got = states[cut.layer + 1][sample, new.start : new.stop]
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
                places = [[place] for place in keep] + groups
                own, names = stands_for[image], carriers[image]
                stands_for[image] = [set().union(*(own[p] for p in group)) for group in places]
                carriers[image] = [names[group[0]] for group in places]
        with prepared.active():
            model(**prepared.model_inputs)
        reports = prepared.report().images
    for image, report in enumerate(reports):
        assert report.decoder_layer_tokens == (N, 6, 4, 3)
        assert request.kept[image].tolist() == carriers[image]
        assert report.kept.tolist() == sorted(carriers[image])
        pairs = zip(carriers[image], stands_for[image], strict=True)
        assert report.merged == {name: tuple(sorted(g)) for name, g in pairs if len(g) > 1}
    assert any(report.merged for report in reports)


@pytest.mark.parametrize("position_ids", ["compact", "original"])
def test_positions_of_merged_tokens(position_ids: str) -> None:
    """Renumbered behind the kept ones, or those of their centres."""
    method = SparseVLM(stage_keep_tokens=(4, 3, 2), position_ids=position_ids)
    model = tiny.tiny_llava()
    seen: list[Tensor] = []
    with torch.no_grad(), LMMParts(model) as parts:
        inputs = tiny.batch(PROMPTS[:1], tiny.images(1))
        prepared = prepare(parts, inputs, [method])
        model.model.language_model.layers[3].self_attn.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["position_ids"][0]), with_kwargs=True
        )
        with prepared.active():
            model.generate(**prepared.model_inputs, max_new_tokens=2, do_sample=False)
        request = prepared._request
    assert request is not None
    n_text = len(PROMPTS[0]) - N - 3
    if position_ids == "compact":
        assert seen[0].tolist() == list(range(3 + 3 + n_text))
        assert seen[1].tolist() == [3 + 3 + n_text]
    else:
        image = (request.kept[0] + 3).tolist()
        assert seen[0].tolist() == [0, 1, 2, *image, *range(3 + N, 3 + N + n_text)]
        assert seen[1].tolist() == [3 + N + n_text]


def test_without_recycling_nothing_is_merged() -> None:
    with torch.no_grad(), LMMParts(tiny.tiny_llava()) as parts:
        method = SparseVLM(stage_keep_tokens=(20, 20, 6), recycle=False)
        prepared = prepare(parts, tiny.batch(PROMPTS, tiny.images(3)), [method])
        with prepared.active():
            parts.model(**prepared.model_inputs)
        for report in prepared.report().images:
            # The second cut finds no more than it keeps.
            assert report.decoder_layer_tokens == (N, 20, 20, 6)
            assert not report.merged


# Where the text stands


def test_text_in_front_of_a_last_image_rates_it_too() -> None:
    """It could not see the image: without looking ahead all scores would be 0."""
    with torch.no_grad(), LMMParts(tiny.tiny_llava()) as parts:
        kept = []
        for ids in (tiny.prompt(1, 5, 12, 14, I), tiny.prompt(1, 15, 12, 14, I)):
            prepared = prepare(
                parts, tiny.batch([ids], tiny.images(1)), [SparseVLM(keep_tokens=12)]
            )
            with prepared.active():
                logits = parts.model(**prepared.model_inputs).logits
            assert bool(torch.isfinite(logits).all())
            kept.append(prepared.report().images[0].kept.tolist())
    assert kept[0] != kept[1]


def test_a_prompt_without_text_is_refused() -> None:
    with torch.no_grad(), LMMParts(tiny.tiny_llava()) as parts:
        inputs = tiny.batch([tiny.prompt(I), tiny.prompt(1, 5)], tiny.images(1))
        prepared = prepare(parts, inputs, [SparseVLM(keep_tokens=12)])
        with prepared.active(), pytest.raises(PromptError, match="has 0 such text"):
            parts.model(**prepared.model_inputs)
        # The others ask with the last token, whatever it is.
        for method in (FastV(keep_tokens=12), PyramidDrop(keep_tokens=12)):
            prepared = prepare(parts, inputs, [method])
            with prepared.active():
                parts.model(**prepared.model_inputs)
            assert len(prepared.report().images[0].kept) == 12


def toy_rows(queries: Tensor, keys: Tensor) -> SampleRows:
    """One head of width 1 without rotation; column 0 is padding."""
    length = len(queries)
    parts: Any = SimpleNamespace(heads=1, kv_heads=1, head_dim=1)
    rope = (torch.ones(length, 2), torch.zeros(length, 2))
    pairs = [torch.cat([one, torch.zeros_like(one)], dim=1) for one in (queries, keys)]
    parts.head_dim = 2
    return SampleRows(length - 1, 1.0, torch.arange(1, length), dict(enumerate(pairs)), rope, parts)


def test_prompt_attention_toy() -> None:
    """Keys 0, ln 3, 0, ln 4 behind padding; a query of 1 sees 1 : 3 (: 1 : 4)."""
    keys = torch.tensor([[9.0], [0.0], [math.log(3)], [0.0], [math.log(4)]])
    rows = toy_rows(torch.ones(5, 1), keys)
    visual = torch.tensor([1, 2])
    second = prompt_attention(rows, torch.tensor([2]), visual)
    torch.testing.assert_close(second, torch.tensor([1 / 4, 3 / 4]))
    last = prompt_attention(rows, torch.tensor([4]), visual)
    torch.testing.assert_close(last, torch.tensor([1 / 9, 3 / 9]))
    both = prompt_attention(rows, torch.tensor([2, 4]), visual)
    torch.testing.assert_close(both, (second + last) / 2)
    ahead = prompt_attention(rows, torch.tensor([1]), visual, causal=False)
    torch.testing.assert_close(ahead, last)


def test_many_queries_do_not_change_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    asking, keys = torch.randn(50, 1), torch.randn(50, 1)
    queries, visual = torch.arange(10, 50), torch.arange(3, 9)
    want = prompt_attention(toy_rows(asking, keys), queries, visual)
    monkeypatch.setattr("mmlm_efficient.pruning.decoder_ranking._ROWS", 7)
    torch.testing.assert_close(prompt_attention(toy_rows(asking, keys), queries, visual), want)


def test_rows_of_an_earlier_image_serve_the_next_one() -> None:
    """Asked again, with other queries among them or seeing ahead, as from the start."""
    torch.manual_seed(1)
    asking, keys = torch.randn(20, 1), torch.randn(20, 1)
    shared = toy_rows(asking, keys)
    for queries, first, causal in (
        ([12, 14], 2, True),
        ([14, 17, 12], 6, True),
        ([14, 17], 6, False),
        ([19], 2, True),
    ):
        given = torch.tensor(queries), torch.arange(first, first + 4)
        got = prompt_attention(shared, *given, causal=causal)
        want = prompt_attention(toy_rows(asking, keys), *given, causal=causal)
        torch.testing.assert_close(got, want)
    assert sorted(shared.shared.attention) == [
        (12, True),
        (14, False),
        (14, True),
        (17, False),
        (17, True),
        (19, True),
    ]


# Settings


def run(method: PruningMethod, layers: int = 4, tower: bool = True) -> None:
    model = tiny.tiny_llava(language={"num_hidden_layers": layers})
    with torch.no_grad(), LMMParts(model) as parts:
        if not tower:
            model.model.vision_tower.forward = None
        prepare(parts, tiny.batch(PROMPTS[:1], tiny.images(1)), [method])


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (FastV, {"keep_tokens": 4, "layer": 0}, "fastv: layer: .*greater than or equal to 1"),
        (PyramidDrop, {"keep_tokens": 4, "stage_layers": [0, 2]}, "ascending order.*>= 1, got"),
        (PyramidDrop, {"keep_tokens": 4, "stage_layers": (2, 2)}, "ascending order, each once"),
        (PyramidDrop, {"keep_tokens": 4, "stage_layers": ()}, "stage_layers must be decoder"),
        (SparseVLM, {"keep_tokens": 4, "cut_layers": (0, 3, 2)}, "cut_layers must be decoder"),
        (SparseVLM, {"keep_tokens": 4, "cut_layers": (1, 2)}, "sparsevlm: cut_layers"),
        (SparseVLM, {"stage_keep_tokens": (4, 5, 5)}, "stage_keep_tokens must not increase"),
        (SparseVLM, {"stage_keep_tokens": (4, 3, 0)}, "stage_keep_tokens must be an integer >= 1"),
        (SparseVLM, {"stage_keep_tokens": (4, 3)}, "sparsevlm: stage_keep_tokens"),
        (SparseVLM, {"stage_keep_tokens": (4, 3, 2), "keep_ratio": 0.5}, "leave keep_tokens and"),
        (SparseVLM, {"keep_tokens": 4, "recycle": 1}, "sparsevlm: recycle"),
    ],
)
def test_bad_settings(method: type[PruningMethod], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        method(**settings)


@pytest.mark.parametrize(
    ("method", "layers", "message"),
    [
        (FastV(keep_tokens=4, layer=4), 4, "layer=4, but the language model has 4 layers"),
        (PyramidDrop(keep_tokens=4), 3, "at least 4 decoder layers, the model has 3"),
        (PyramidDrop(keep_tokens=4, stage_layers=(1, 4)), 4, r"stage_layers=\[1, 4\], but the"),
        (
            FlowCut(keep_tokens=9, llm_prune_layer=7, llm_keep_tokens=4),
            4,
            "llm_prune_layer=7, but the language model has 4 layers: give at most 3",
        ),
        (SparseVLM(keep_tokens=4), 3, "needs at least 4, the model has 3"),
        (SparseVLM(keep_tokens=4, cut_layers=(0, 1, 4)), 4, r"cut_layers=\[0, 1, 4\], but the"),
    ],
)
def test_layers_that_the_model_lacks(method: PruningMethod, layers: int, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        run(method, layers, tower=False)
    model = tiny.tiny_llava(language={"num_hidden_layers": layers})
    with pytest.raises(SettingsError, match=message):
        EfficientLMM(model, tiny_processor(), method)


@pytest.mark.parametrize("method", [FastV, PyramidDrop, SparseVLM])
def test_a_budget_of_all_tokens_is_told_once(
    method: type[PruningMethod], caplog: pytest.LogCaptureFixture
) -> None:
    run(method(keep_tokens=N))
    assert caplog.text.count("nothing is pruned") == 1


def test_the_shallowest_models() -> None:
    run(FastV(keep_tokens=4), layers=3)
    run(PyramidDrop(keep_tokens=4, stage_layers=[1]), layers=2)
    run(SparseVLM(keep_tokens=4, cut_layers=[0, 1, 2]), layers=3)
