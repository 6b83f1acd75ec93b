"""Station 3: cuts inside the language model, checked against independent computations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.prepare import LMMParts, Prepared, prepare
from mmlm_efficient.pruning import FlowCut
from mmlm_efficient.stations.handed import CACHE
from mmlm_efficient.stations.layer import LayerCut, LayerRequest, SampleRows
from tests import tiny

I = tiny.IMAGE_TOKEN  # noqa: E741
PROMPTS = [
    tiny.prompt(1, 5, I, 6, 7),
    tiny.prompt(1, 9, 11),
    tiny.prompt(1, 5, I, 6, 7, 8, I, 9, 10),
]


def pruned(parts: LMMParts, position_ids: str = "compact", layer: int = 1) -> Prepared:
    """A padded batch with a text-only sample; 14 tokens per image, then 5, 9 and 14."""
    method = FlowCut(
        keep_tokens=14, llm_prune_layer=layer, llm_keep_tokens=(5, 9, 14), position_ids=position_ids
    )
    return prepare(parts, tiny.batch(PROMPTS, tiny.images(3)), [method])


def columns_left(prepared: Prepared) -> list[list[int]]:
    """For each sample, the columns of the shortened prompt that survive the decoder's cut."""
    request = prepared._request
    assert request is not None
    left = []
    for row, blocks in zip(prepared.layout.mask, prepared.layout.blocks, strict=True):
        stays = row.clone()
        for block in blocks:
            if block.image in request.kept:
                stays[block.start : block.stop] = False
                stays[request.kept[block.image] + block.start] = True
        left.append(stays.nonzero().squeeze(1).tolist())
    return left


@pytest.mark.parametrize("text", tiny.TEXTS)
def test_relation_is_the_models_own_attention(text: str) -> None:
    """Eager attention weights of the last token, renormalised over an image, are `relation`."""
    model = tiny.tiny_llava("clip", text, attn="eager")
    rows_seen: list[torch.Tensor] = []

    def score(rows: SampleRows, columns: torch.Tensor) -> torch.Tensor:
        query, keys = rows.query(torch.tensor([rows.last])), rows.keys(columns)
        logits = (query * keys).sum(-1) * rows.scaling
        rows_seen.append(logits.softmax(-1).mean(0))
        return rows_seen[-1]

    with torch.no_grad(), LMMParts(model) as parts:
        base = prepare(parts, tiny.batch(PROMPTS, tiny.images(3)), [FlowCut(keep_tokens=14)])
        attentions = model(**base.model_inputs, output_attentions=True).attentions[2]
        cuts = [LayerCut(2, (4, 5, 6), score)]
        request = LayerRequest(base.layout, cuts, compact=True, gaps=False)
        with parts.layer.active(request):
            model(**base.model_inputs)
    blocks = [(s, b) for s, sample in enumerate(base.layout.blocks) for b in sample]
    for (sample, block), got in zip(blocks, rows_seen, strict=True):
        weights = attentions[sample, :, -1, block.start : block.stop]
        want = (weights / weights.sum(-1, keepdim=True)).mean(0)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        keep = torch.sort(want.sort(descending=True).indices[: (4, 5, 6)[block.image]]).values
        assert request.kept[block.image].tolist() == keep.tolist()
    assert request.scored_layers == [2]


@pytest.mark.parametrize("text", tiny.TEXTS)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_cut_equals_masking_the_cut_keys(text: str, layer: int) -> None:
    """With original positions, cutting tokens equals hiding them from the later layers."""
    model = tiny.tiny_llava("clip", text, attn="eager")
    with torch.no_grad(), LMMParts(model) as parts:
        prepared = pruned(parts, "original", layer)
        with prepared.active():
            got = model(**prepared.model_inputs).logits
        left = columns_left(prepared)
        hidden = torch.ones_like(prepared.layout.mask)
        for sample, columns in enumerate(left):
            hidden[sample, columns] = False

        def mask_keys(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            low = torch.finfo(torch.float32).min
            mask = kwargs["attention_mask"].masked_fill(hidden[:, None, None], low)
            return args, {**kwargs, "attention_mask": mask}

        for module in model.model.language_model.layers[layer + 1 :]:
            module.register_forward_pre_hook(mask_keys, with_kwargs=True)
        want = model(**prepared.model_inputs).logits
    for sample, columns in enumerate(left):
        own = got[sample, got.shape[1] - len(columns) :]
        torch.testing.assert_close(own, want[sample, columns], atol=1e-4, rtol=0)


@pytest.mark.parametrize("position_ids", ["compact", "original"])
@pytest.mark.parametrize("text", tiny.TEXTS)
def test_cache_lengths_and_decoding_positions(text: str, position_ids: str) -> None:
    """Ragged cache S,S,S',...; every layer's rotary table gets the positions of the spec."""
    model = tiny.tiny_llava("clip", text)
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(4)}
    with torch.no_grad(), LMMParts(model) as parts:
        for layer, module in enumerate(model.model.language_model.layers):
            module.self_attn.register_forward_pre_hook(
                lambda _, __, kwargs, layer=layer: seen[layer].append(kwargs["position_ids"]),
                with_kwargs=True,
            )
        prepared = pruned(parts, position_ids)
        with prepared.active():
            output = model.generate(
                **prepared.model_inputs,
                max_new_tokens=4,
                do_sample=False,
                return_dict_in_generate=True,
            )
    width = prepared.layout.mask.shape[1]
    left = columns_left(prepared)
    shorter = max(len(columns) for columns in left)
    cache = output[CACHE]
    lengths = [cache.get_seq_length(layer) for layer in range(4)]
    assert lengths == [width + 3, width + 3, shorter + 3, shorter + 3]
    removed = prepared.layout.mask.sum(1) - torch.tensor([len(columns) for columns in left])
    for step in range(1, 4):
        before, after = seen[1][step][:, 0], seen[2][step][:, 0]
        want = before - removed if position_ids == "compact" else before
        assert after.tolist() == want.tolist()
        assert torch.equal(seen[2][step], seen[3][step])
    for sample, columns in enumerate(left):
        own = seen[2][0][sample, shorter - len(columns) :]
        base = seen[1][0][sample]
        if position_ids == "original":
            assert own.tolist() == base[columns].tolist()
        else:
            assert own.tolist() == list(range(int(base[columns[0]]), len(columns)))


@pytest.mark.parametrize("position_ids", ["compact", "original"])
def test_original_positions_are_those_of_the_stock_prompt(position_ids: str) -> None:
    model = tiny.tiny_llava()
    inputs = tiny.batch(PROMPTS, tiny.images(3))
    with torch.no_grad(), LMMParts(model) as parts:
        prepared = prepare(
            parts, inputs, [FlowCut(keep_tokens=(4, 7, 9), position_ids=position_ids)]
        )
    if position_ids == "compact":
        assert "position_ids" not in prepared.model_inputs
        return
    for sample, blocks in enumerate(prepared.layout.blocks):
        mask = prepared.layout.mask[sample]
        got = prepared.model_inputs["position_ids"][sample][mask].tolist()
        ids = PROMPTS[sample]
        want, image_start = [], 0
        queue = list(blocks)
        while image_start < len(ids):
            if ids[image_start] == I:
                index = prepared.tokens[queue.pop(0).image].index
                want.extend((index + image_start).tolist())
                image_start += tiny.N_PATCHES
            else:
                want.append(image_start)
                image_start += 1
        assert got == want


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_several_cuts_in_one_decoder(attn: str) -> None:
    """Stages nest: what a later cut keeps is a subset of what an earlier one kept."""
    model = tiny.tiny_llava(attn=attn)

    def norm_score(rows: SampleRows, columns: torch.Tensor) -> torch.Tensor:
        return rows.values(columns).abs().sum((0, 2))

    cuts = [LayerCut(2, (3, 9, 2), norm_score), LayerCut(0, (10, 12, 14), norm_score)]
    pixels, budgets = tiny.images(3), FlowCut(keep_tokens=14)
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), LMMParts(model) as parts:
        base = prepare(parts, tiny.batch(PROMPTS, pixels), [budgets])
        request = LayerRequest(base.layout, cuts, compact=True, gaps=False)
        with parts.layer.active(request):
            together = model.generate(**base.model_inputs, **options)[:, -4:]
        assert request.cut_layers == [0, 2]
        assert request.counts == {0: [10, 3], 1: [12, 9], 2: [14, 2]}
        assert {image: len(kept) for image, kept in request.kept.items()} == {0: 3, 1: 9, 2: 2}
        for sample, images in enumerate(([0], [], [1, 2])):
            alone = prepare(
                parts,
                tiny.batch([PROMPTS[sample]], pixels[images] if images else None),
                [budgets] if images else [],
            )
            own = [
                LayerCut(cut.layer, tuple(cut.targets[i] for i in images), cut.score)
                for cut in cuts
            ]
            request = LayerRequest(alone.layout, own, compact=True, gaps=False)
            with parts.layer.active(request):
                want = model.generate(**alone.model_inputs, **options)[0, -4:]
            assert together[sample].tolist() == want.tolist()


def test_a_target_above_the_count_leaves_output_and_cache_stock() -> None:
    model = tiny.tiny_llava()
    inputs = tiny.batch(PROMPTS[:1], tiny.images(1))
    with torch.no_grad(), LMMParts(model) as parts:
        plain = prepare(parts, inputs, [FlowCut(keep_tokens=9)])
        cut = prepare(parts, inputs, [FlowCut(keep_tokens=9, llm_prune_layer=1, llm_keep_tokens=9)])
        want = model(**plain.model_inputs)
        with cut.active():
            got = model(**cut.model_inputs)
    assert torch.equal(got.logits, want.logits)
    for layer in range(4):
        got_layer, want_layer = (
            got[CACHE].layers[layer],
            want[CACHE].layers[layer],
        )
        assert torch.equal(got_layer.keys, want_layer.keys)


@pytest.mark.parametrize("position_ids", ["compact", "original"])
def test_beam_search_and_several_sequences_equal_single_requests(position_ids: str) -> None:
    """Rows of one prompt share its cut, so beams may be reordered among themselves."""
    model = tiny.tiny_llava()
    pixels = tiny.images(3)
    options: dict[str, Any] = {
        "max_new_tokens": 5,
        "num_beams": 3,
        "num_return_sequences": 2,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    targets = (5, 9, 13)
    with torch.no_grad(), LMMParts(model) as parts:

        def run(samples: list[int], images: list[int]) -> Any:
            method = FlowCut(
                keep_tokens=14,
                llm_prune_layer=1,
                llm_keep_tokens=tuple(targets[i] for i in images),
                position_ids=position_ids,
            )
            inputs = tiny.batch([PROMPTS[s] for s in samples], pixels[images])
            prepared = prepare(parts, inputs, [method])
            for _ in range(2):  # generate() must not spoil what was prepared
                with prepared.active():
                    output = model.generate(**prepared.model_inputs, **options)
            return output

        together = run([0, 1, 2], [0, 1, 2])
        for place, samples, images in ((0, [0], [0]), (4, [2], [1, 2])):
            alone = run(samples, images)
            got = together.sequences[place : place + 2, -5:]
            assert got.tolist() == alone.sequences[:, -5:].tolist()
            torch.testing.assert_close(
                together.sequences_scores[place : place + 2],
                alone.sequences_scores,
                atol=1e-4,
                rtol=0,
            )


def test_sampling_is_reproducible() -> None:
    model = tiny.tiny_llava()
    with torch.no_grad(), LMMParts(model) as parts:
        prepared = pruned(parts)
        runs = []
        for _ in range(2):
            torch.manual_seed(5)
            with prepared.active():
                ids = model.generate(
                    **prepared.model_inputs, max_new_tokens=5, do_sample=True, temperature=2.0
                )
            runs.append(ids.tolist())
    assert runs[0] == runs[1]


@pytest.mark.parametrize("window", [8, 30])
@pytest.mark.parametrize("text", ["mistral", "qwen2"])
def test_sliding_windows(text: str, window: int) -> None:
    """Layers with a sliding window get a window over what is left."""
    overrides: dict[str, Any] = {"sliding_window": window}
    if text == "qwen2":
        overrides |= {"use_sliding_window": True, "max_window_layers": 2}
    model = tiny.tiny_llava("clip", text, language=overrides)
    pixels = tiny.images(3)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad(), LMMParts(model) as parts:
        sliding = parts.family.decoder.sliding
        assert sliding == ((True,) * 4 if text == "mistral" else (False, False, True, True))
        prepared = pruned(parts)
        with prepared.active():
            together = model.generate(**prepared.model_inputs, **options)[:, -6:]
        method = FlowCut(keep_tokens=14, llm_prune_layer=1, llm_keep_tokens=(9, 14))
        alone = prepare(parts, tiny.batch(PROMPTS[2:], pixels[1:]), [method])
        with alone.active():
            want = model.generate(**alone.model_inputs, **options)[0, -6:]
    assert together[2].tolist() == want.tolist()


def test_hidden_states_are_recorded_cut() -> None:
    model = tiny.tiny_llava()
    with torch.no_grad(), LMMParts(model) as parts:
        prepared = pruned(parts)
        with prepared.active():
            output = model(**prepared.model_inputs, output_hidden_states=True)
    width = prepared.layout.mask.shape[1]
    lengths = [states.shape[1] for states in output.hidden_states]
    assert lengths[:2] == [width, width]
    assert len(set(lengths[2:])) == 1
    assert lengths[2] < width


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_to_the_end(dtype: torch.dtype, attn: str) -> None:
    model = tiny.tiny_llava(attn=attn).to(dtype)
    with torch.no_grad(), LMMParts(model) as parts:
        prepared = pruned(parts)
        with prepared.active():
            logits = model(**prepared.model_inputs).logits
            ids = model.generate(**prepared.model_inputs, max_new_tokens=3, do_sample=False)
    assert logits.dtype == dtype
    assert bool(torch.isfinite(logits[:, -1]).all())
    assert ids.shape == (3, prepared.layout.mask.shape[1] + 3)
    assert [dict(r.per_station)["layer"] for r in prepared.report().images] == [5, 9, 14]


class TestRefusals:
    def test_chunked_prefill(self) -> None:
        model = tiny.tiny_llava()
        with torch.no_grad(), LMMParts(model) as parts:
            prepared = pruned(parts)
            with prepared.active(), pytest.raises(UnsupportedError, match="prefill_chunk_size"):
                model.generate(**prepared.model_inputs, max_new_tokens=2, prefill_chunk_size=8)

    def test_assisted_decoding(self) -> None:
        model = tiny.tiny_llava()
        with torch.no_grad(), LMMParts(model) as parts:
            prepared = pruned(parts)
            cache = DynamicCache(config=model.config.get_text_config())
            longer = torch.zeros(3, prepared.layout.mask.shape[1] + 2, 32)
            with prepared.active(), pytest.raises(UnsupportedError, match="assistant_model"):
                model.model.language_model(inputs_embeds=longer, **{CACHE: cache})

    def test_filled_cache(self) -> None:
        model = tiny.tiny_llava()
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad(), LMMParts(model) as parts:
            prepared = pruned(parts)
            mask = prepared.model_inputs["attention_mask"]
            model(torch.full((3, 4), 5), **{CACHE: cache})
            inputs = {
                **prepared.model_inputs,
                "attention_mask": torch.cat([torch.ones_like(mask[:, :4]), mask], dim=1),
                CACHE: cache,
            }
            with prepared.active(), pytest.raises(UnsupportedError, match="only an empty cache"):
                model(**inputs)

    def test_static_cache(self) -> None:
        model = tiny.tiny_llava()
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
        with torch.no_grad(), LMMParts(model) as parts:
            prepared = pruned(parts)
            with prepared.active(), pytest.raises(UnsupportedError, match="dynamic cache"):
                model(**prepared.model_inputs, **{CACHE: cache})

    def test_another_batch_than_the_prepared_one(self) -> None:
        model = tiny.tiny_llava()
        with torch.no_grad(), LMMParts(model) as parts:
            prepared = pruned(parts)
            with prepared.active(), pytest.raises(UnsupportedError, match="3 prompt"):
                model(**tiny.batch([[1, 2, 3]] * 2))
