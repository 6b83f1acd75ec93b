"""Reports of VAR, checked by hand: sinks from the residual stream, rows from an eager run."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlm_efficient import EfficientLMM
from mmlm_efficient.prepare import LMMParts, Prepared, prepare
from mmlm_efficient.pruning.base import PruningMethod
from mmlm_efficient.pruning.fastv import FastV
from mmlm_efficient.pruning.flowcut import FlowCut
from mmlm_efficient.pruning.sparsevlm import SparseVLM
from mmlm_efficient.pruning.uniform_pruning import UniformPruning
from mmlm_efficient.pruning.visionzip import VisionZip
from mmlm_efficient.sinks.var import VAR
from mmlm_efficient.tokens import CLS_INDEX, ImageAttention, LayerRedistribution, PruningReport
from tests import tiny, tiny_families
from tests.test_matrix import generated
from tests.tiny_processor import picture, tiny_processor

DIMS, THRESHOLD = [3, 11], 1.2
VAR_STATS = VAR(
    sink_dims=DIMS,
    sink_threshold=THRESHOLD,
    min_nonsink_ratio=0.2,
    min_image_mass=0.1,
    first_layer=1,
    skip_last_layer=False,
    return_stats=True,
)
# Two prompts of different length, padded left; the second shows two images.
PROMPTS = [
    tiny.prompt(1, 5, tiny.IMAGE_TOKEN, 6, 7, 8),
    tiny.prompt(1, tiny.IMAGE_TOKEN, 9, 10, tiny.IMAGE_TOKEN, 12, 14, 15),
]
SAMPLE_OF = (0, 1, 1)


@functools.cache
def parts() -> LMMParts:
    return LMMParts(tiny.tiny_llava())


def inputs(sample: int | None = None, padding_side: str = "left") -> dict[str, Tensor]:
    if sample is None:
        return tiny.batch(PROMPTS, tiny.images(3), padding_side)
    own = [image for image, of in enumerate(SAMPLE_OF) if of == sample]
    return tiny.batch([PROMPTS[sample]], tiny.images(3)[own])


@torch.no_grad()
def prefilled(
    *methods: Any, given: dict[str, Tensor] | None = None
) -> tuple[Prepared, list[Tensor]]:
    """A prepared request after one forward, and what entered each decoder layer."""
    one = prepare(parts(), inputs() if given is None else given, [*methods, VAR_STATS])
    entered: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        for module in parts().family.decoder.layers
    ]
    try:
        with one.active():
            parts().model(**one.model_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return one, entered


def scores_of(hidden: Tensor) -> Tensor:
    rms = (hidden.float() ** 2).mean(dim=-1).add(1e-6).sqrt()
    return hidden[..., DIMS].abs().amax(dim=-1) / rms


def layers_of(report: PruningReport, sample: int) -> dict[int, LayerRedistribution]:
    return {one.layer: one for one in report.redistribution if one.sample == sample}


def test_every_layer_of_every_prompt_is_there() -> None:
    one, _ = prefilled()
    found = [(layer.sample, layer.layer) for layer in one.report().redistribution]
    assert found == [(sample, layer) for sample in (0, 1) for layer in (1, 2, 3)]
    assert [list(layer.images) for layer in one.report().redistribution] == [[0]] * 3 + [[1, 2]] * 3


def test_sinks_are_those_of_the_residual_stream() -> None:
    one, entered = prefilled()
    report, total = one.report(), 0
    for sample, ids in enumerate(PROMPTS):
        for number, layer in layers_of(report, sample).items():
            own = (scores_of(entered[number])[sample] > THRESHOLD)[-len(ids) :]
            visual = torch.tensor(ids) == tiny.IMAGE_TOKEN
            text = torch.nonzero(own & ~visual).flatten().tolist()
            assert list(layer.text_sinks) == text
            flags = own[visual].view(-1, tiny.N_PATCHES)
            for flag, image in zip(flags, layer.images.values(), strict=True):
                assert image.sink.tolist() == flag.tolist()
                assert image.index.tolist() == list(range(tiny.N_PATCHES))
                assert list(image.sinks) == torch.nonzero(flag).flatten().tolist()
                total += len(image.sinks)
    assert 0 < total < 9 * tiny.N_PATCHES, "some tokens are sinks and some are none"


def test_rows_of_the_first_layer_follow_from_the_eager_map() -> None:
    """What enters the first changed layer is stock, so its map is that of the eager model."""
    eager = tiny.tiny_llava(attn="eager")
    with torch.no_grad():
        maps = eager(**inputs(), output_attentions=True).attentions[1]
    one, _ = prefilled()
    given = 0
    for sample, ids in enumerate(PROMPTS):
        layer = layers_of(one.report(), sample)[1]
        visual = torch.tensor(ids) == tiny.IMAGE_TOKEN
        sink = torch.zeros(len(ids), dtype=torch.bool)
        sink[visual] = torch.cat([image.sink for image in layer.images.values()])
        sink[list(layer.text_sinks)] = True
        own = maps[sample][:, -len(ids) :, -len(ids) :].double()
        first = int(torch.nonzero(visual)[0])
        rows = [row for row in range(first, len(ids)) if not visual[row]]
        changed, moved = [0] * own.shape[0], []
        for head in range(own.shape[0]):
            for row in rows:
                a = own[head, row]
                m_a, m_b = float(a[visual & sink].sum()), float(a[visual & ~sink].sum())
                seen = int(visual[: row + 1].sum())
                sees_sink = bool((visual & sink)[: row + 1].any())
                limit = (1 - 0.2) * (m_a + m_b + seen * 1e-6)
                if sees_sink and m_a + m_b >= 0.1 and m_a <= limit:
                    changed[head] += 1
                    moved.append(0.6 * float(a[sink].sum()))
        assert layer.rows == len(rows)
        assert list(layer.changed) == changed
        assert sum(changed) > 0
        assert layer.moved == pytest.approx(sum(moved) / len(moved), rel=1e-4)
        before = torch.cat([image.before for image in layer.images.values()], dim=1)
        after = torch.cat([image.after for image in layer.images.values()], dim=1)
        torch.testing.assert_close(before.double(), own[:, -1][:, visual], atol=1e-6, rtol=1e-4)
        flags = sink[visual]
        for head in range(own.shape[0]):
            receives = before[head, ~flags].sum()
            gives = own[head, -1][sink].sum()
            gain = float(after[head, ~flags].sum() / receives)
            if gain == 1.0:
                assert torch.equal(after[head], before[head])
                continue
            assert gain == pytest.approx(float(1 + 0.6 * gives / receives), rel=1e-4)
            torch.testing.assert_close(after[head, flags], 0.4 * before[head, flags])
            given += 1
    assert given


MAPPED: list[tuple[str, PruningMethod]] = [
    ("tower", FlowCut(keep_tokens=9)),
    ("bridge", UniformPruning(keep_tokens=(9, 5, 12))),
    ("decoder", FastV(keep_tokens=(9, 5, 12), layer=2)),
]


@pytest.mark.parametrize(("station", "method"), MAPPED, ids=[name for name, _ in MAPPED])
def test_indices_are_those_of_the_unpruned_image(station: str, method: PruningMethod) -> None:
    one, entered = prefilled(method)
    report = one.report()
    for sample in range(len(PROMPTS)):
        text = sum(token != tiny.IMAGE_TOKEN for token in PROMPTS[sample])
        for number, layer in layers_of(report, sample).items():
            flags = scores_of(entered[number])[sample] > THRESHOLD
            lengths = [len(image.index) for image in layer.images.values()]
            flags = flags[-(text + sum(lengths)) :]
            column = 2 if sample == 0 else 1
            for image, attention in layer.images.items():
                kept = report.images[image].kept
                cut = station != "decoder" or number >= 2
                want = kept if cut else torch.arange(tiny.N_PATCHES)
                assert attention.index.tolist() == want.tolist()
                block = flags[column : column + len(want)]
                assert attention.sinks == tuple(want[block].tolist())
                column += len(want) + 2
            assert attention.before.shape == (4, lengths[-1])


def test_text_sinks_are_counted_in_the_prompt_that_entered_the_decoder() -> None:
    """A text sink behind an image keeps its place when the decoder cuts the image."""
    one, entered = prefilled(FastV(keep_tokens=9, layer=2))
    places = set()
    for layer in one.report().redistribution:
        if layer.layer < 2:
            continue
        ids = PROMPTS[layer.sample]
        text = [place for place, token in enumerate(ids) if token != tiny.IMAGE_TOKEN]
        assert set(layer.text_sinks) <= set(text)
        mask = one._request.running_layout.mask[layer.sample]  # type: ignore[union-attr]
        flags = (scores_of(entered[layer.layer])[layer.sample] > THRESHOLD)[mask]
        columns = [column for column in range(len(flags)) if flags[column]]
        left = [p for p in range(len(ids)) if p in text]
        # Text in front keeps its column, text at the end its distance from the end.
        tail = 3
        want = {len(ids) - len(flags) + c for c in columns if c >= len(flags) - tail}
        assert {place for place in layer.text_sinks if place in left[-tail:]} == want
        places |= want
    assert places


@pytest.mark.parametrize("method", [SparseVLM(keep_tokens=9), VisionZip(keep_tokens=9)])
def test_merged_tokens_are_their_carriers(method: PruningMethod) -> None:
    one, _ = prefilled(method)
    report = one.report()
    merged = 0
    for layer in report.redistribution:
        for number, attention in layer.images.items():
            image = report.images[number]
            assert len(attention.index) == image.decoder_layer_tokens[layer.layer]
            index = [token for token in attention.index.tolist() if token != CLS_INDEX]
            assert len(set(index)) == len(index)
            if layer.layer == 3:
                assert sorted(index) == image.kept.tolist()
                merged += len(set(index) & set(image.merged))
    assert merged


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
@torch.no_grad()
def test_every_family_names_its_own_tokens(family: str) -> None:
    model = LMMParts(tiny_families.tiny_model(family))
    given = tiny_families.sample_inputs(family, "uneven")
    one = prepare(model, given, [UniformPruning(keep_ratio=0.4), VAR_STATS])
    with one.active():
        model.model(**one.model_inputs)
    report = one.report()
    assert report.redistribution
    for layer in report.redistribution:
        for number, attention in layer.images.items():
            index = attention.index
            assert torch.equal(index[index != CLS_INDEX], report.images[number].kept)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("methods", [(), (FastV(keep_tokens=9, layer=2),)], ids=["whole", "fastv"])
def test_a_prompt_reports_as_alone(methods: tuple[PruningMethod, ...], padding_side: str) -> None:
    """Padding, in front or behind, is no row that might change, no sink, and not the last row."""
    together, _ = prefilled(*methods, given=inputs(padding_side=padding_side))
    for sample, ids in enumerate(PROMPTS):
        alone, _ = prefilled(*methods, given=inputs(sample))
        own, first = layers_of(together.report(), sample), SAMPLE_OF.index(sample)
        assert list(own) == [layer.layer for layer in alone.report().redistribution]
        text = sum(token != tiny.IMAGE_TOKEN for token in ids[ids.index(tiny.IMAGE_TOKEN) :])
        for want in alone.report().redistribution:
            got = own[want.layer]
            assert got.rows == text
            assert got.text_sinks == want.text_sinks
            assert (got.rows, got.changed) == (want.rows, want.changed)
            assert got.moved == pytest.approx(want.moved, rel=1e-4)
            assert got.gain == pytest.approx(want.gain, rel=1e-4)
            assert list(got.images) == [number + first for number in want.images]
            for number, attention in want.images.items():
                same = got.images[number + first]
                assert torch.equal(same.index, attention.index)
                assert torch.equal(same.sink, attention.sink)
                torch.testing.assert_close(same.before, attention.before, atol=1e-5, rtol=1e-3)
                torch.testing.assert_close(same.after, attention.after, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_decoding_is_counted_token_by_token() -> None:
    one, _ = prefilled()
    generated(one)
    cached = [layer.decoded for layer in one.report().redistribution]
    assert {len(decoded) for decoded in cached} == {3}, "the last token is not run"
    assert sum(map(sum, cached)) > 0
    assert all(0 <= heads <= 4 for decoded in cached for heads in decoded)
    generated(one, use_cache=False)
    assert [layer.decoded for layer in one.report().redistribution] == cached
    generated(one, prefill_chunk_size=5)
    assert [layer.decoded for layer in one.report().redistribution] == cached
    generated(one, num_beams=2)
    assert all(layer.decoded == () for layer in one.report().redistribution)


@torch.no_grad()
def test_chunks_report_as_one_prefill() -> None:
    one, _ = prefilled()
    whole = one.report().redistribution
    generated(one, prefill_chunk_size=7)
    for got, want in zip(one.report().redistribution, whole, strict=True):
        assert (got.rows, got.changed, got.text_sinks) == (want.rows, want.changed, want.text_sinks)
        assert got.sinks == want.sinks
        for image, attention in want.images.items():
            torch.testing.assert_close(
                got.images[image].before, attention.before, atol=1e-5, rtol=1e-3
            )


def test_an_answer_has_its_own_entries() -> None:
    with EfficientLMM(tiny.tiny_llava(), tiny_processor(), [VAR_STATS]) as lmm:
        asked = [("where cat ?", picture()), ("where", None), ("where cat ? where", picture(1))]
        answers = lmm.ask_batch(asked, max_new_tokens=5)
        for answer, (question, image) in zip(answers, asked, strict=True):
            alone = lmm.ask(question, image, max_new_tokens=5)
            own, single = answer.report.redistribution, alone.report.redistribution
            assert [one.layer for one in own] == ([] if image is None else [1, 2, 3])
            assert [one.changed for one in own] == [one.changed for one in single]
            assert [one.decoded for one in own] == [one.decoded for one in single]
            for layer in own:
                assert len(layer.decoded) == answer.usage.completion_tokens - 1
                assert set(layer.images) == {one.image for one in answer.report.images}
            plain = json.loads(json.dumps(answer.to_dict()))["redistribution"]
            assert [one["sinks"] for one in plain] == [
                {str(image): list(sinks) for image, sinks in one.sinks.items()} for one in own
            ]
        quiet = lmm.ask(*asked[0], methods=VAR_STATS.model_copy(update={"return_stats": False}))
        assert quiet.report.redistribution == ()
        assert quiet.to_dict()["redistribution"] == []


def test_the_shares_of_the_json() -> None:
    image = ImageAttention(
        index=torch.tensor([2, 5, 7]),
        sink=torch.tensor([False, True, False]),
        before=torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.4, 0.1]]),
        after=torch.tensor([[0.2, 0.1, 0.3], [0.0, 0.4, 0.1]]),
    )
    layer = LayerRedistribution(0, 4, {3: image}, (0,), 5, (2, 0), 0.1, 1.5, (1,))
    plain = layer.to_dict()
    assert plain["sinks"] == {"3": [5]}
    shares = plain["last_token_attention"]
    assert shares["before"] == pytest.approx({"sinks": 0.3, "others": 0.25})
    assert shares["after"] == pytest.approx({"sinks": 0.25, "others": 0.3})
