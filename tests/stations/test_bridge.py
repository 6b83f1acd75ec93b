"""Station 2: finding image blocks, cutting prompts, and the errors of both."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm_efficient.errors import PromptError
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning import FlowCut, UniformPruning
from mmlm_efficient.stations.bridge import (
    Block,
    PaddingSide,
    PromptLayout,
    find_blocks,
    prompt_positions,
    shortened,
)
from tests import tiny

I = tiny.IMAGE_TOKEN  # noqa: E741


def test_blocks_of_adjacent_and_separate_images() -> None:
    ids = torch.tensor([[1, I, I, I, I, 5, I, I], [1, 2, 5, 5, 5, 5, 5, 5]])
    assert find_blocks(ids, [(I, 2)] * 3) == ((Block(0, 1, 3), Block(1, 3, 5), Block(2, 6, 8)), ())


@pytest.mark.parametrize(
    ("ids", "images", "message"),
    [
        ([[1, I, I, I, 5]], 2, "image 1 .*expected 2 placeholders per image, got a run of 3"),
        ([[1, I, I, 5], [1, 5, 5, I]], 2, r"image 1 \(prompt 1, token 3\)"),
        ([[1, I, I, 5]], 2, r"hold 1 image\(s\), but 2 image\(s\) were given: image 1"),
        ([[1, 4, 4, 5]], 1, r"hold 0 image\(s\), but 1 image\(s\)"),
    ],
)
def test_placeholders_that_do_not_match(ids: list[list[int]], images: int, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        find_blocks(torch.tensor(ids), [(I, 2)] * images)


def test_prepare_refuses_a_mismatch_with_and_without_pruning() -> None:
    with LMMParts(tiny.tiny_llava()) as parts:
        for methods in ([], [FlowCut(keep_tokens=4)]):
            with pytest.raises(PromptError, match="image 1 has no counterpart"):
                prepare(parts, tiny.batch([tiny.prompt(1, I, 5)], tiny.images(2)), methods)
            with pytest.raises(PromptError, match="expected 36 placeholders"):
                prepare(parts, tiny.batch([[1, I, 5]], tiny.images(1)), methods)
            with pytest.raises(PromptError, match="0 image"):
                prepare(parts, tiny.batch([tiny.prompt(1, I, 5)]), methods)


def test_pixel_values_of_another_rank() -> None:
    with LMMParts(tiny.tiny_llava()) as parts, pytest.raises(PromptError, match="n_images, 3"):
        prepare(parts, tiny.batch([tiny.prompt(1, I, 5)], tiny.images(1).unsqueeze(0)))


def test_a_prompt_beyond_the_context() -> None:
    model = tiny.tiny_llava(language={"max_position_embeddings": 45})
    with torch.no_grad(), LMMParts(model) as parts:
        inputs = tiny.batch([tiny.prompt(1, I, [5] * 9)], tiny.images(1))
        with pytest.raises(PromptError, match="takes 46 positions, but the model's context has 45"):
            prepare(parts, inputs)
        assert prepare(parts, inputs, [FlowCut(keep_tokens=4)]).layout.mask.shape[1] == 14
        with pytest.raises(PromptError, match="takes 46 positions"):
            prepare(parts, inputs, [FlowCut(keep_tokens=4, position_ids="original")])


@pytest.mark.parametrize("side", ["left", "right"])
def test_cut_by_hand(side: PaddingSide) -> None:
    ids = torch.tensor([[0, 1, I, I, I, 7], [1, I, I, I, 8, 9]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    layout = PromptLayout.of(mask, find_blocks(ids, [(I, 3)] * 2), side)
    new, source = layout.cut({0: torch.tensor([2]), 1: torch.tensor([0, 1])})
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone(), "other": mask[:, :2]}
    got = shortened(inputs, new, source, pad_token_id=0, original_positions=True)
    if side == "left":
        assert got["input_ids"].tolist() == [[0, 0, 1, I, 7], [1, I, I, 8, 9]]
        assert got["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5]
        assert got["labels"].tolist() == [[-100, -100, 1, I, 7], [1, I, I, 8, 9]]
        assert got["position_ids"].tolist() == [[0, 0, 0, 3, 4], [0, 1, 2, 4, 5]]
        assert new.blocks == ((Block(0, 3, 4),), (Block(1, 1, 3),))
        assert new.shift.tolist() == [[0, 0, 0, 2, 2], [0, 0, 0, 1, 1]]
    else:
        assert got["input_ids"].tolist() == [[1, I, 7, 0, 0], [1, I, I, 8, 9]]
        assert got["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
        assert got["position_ids"].tolist() == [[0, 3, 4, 0, 0], [0, 1, 2, 4, 5]]
        assert new.blocks == ((Block(0, 1, 2),), (Block(1, 1, 3),))
    assert got["other"] is inputs["other"]
    assert new.removed.tolist() == [2, 1]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cutting_twice_equals_cutting_once(data: st.DataObject) -> None:
    side: PaddingSide = data.draw(st.sampled_from(["left", "right"]))
    prompts = []
    for _ in range(data.draw(st.integers(1, 3))):
        parts = data.draw(st.lists(st.sampled_from([I, 5, 6]), min_size=1, max_size=5))
        prompts.append([1, *tiny.prompt(*parts, per_image=6)])
    inputs = tiny.batch(prompts, padding_side=side)
    images = sum(ids.count(I) for ids in prompts) // 6
    layout = PromptLayout.of(
        inputs["attention_mask"], find_blocks(inputs["input_ids"], [(I, 6)] * images), side
    )
    subsets = st.sets(st.integers(0, 5), min_size=1)
    first = {i: torch.tensor(sorted(data.draw(subsets))) for i in range(images)}
    second = {}
    for image, keep in first.items():
        places = data.draw(st.sets(st.integers(0, len(keep) - 1), min_size=1))
        second[image] = torch.tensor(sorted(places))
    half, source = layout.cut(first)
    twice, source_2 = half.cut(second)
    once, source_once = layout.cut({i: first[i][second[i]] for i in first})
    assert torch.equal(twice.mask, once.mask)
    assert twice.blocks == once.blocks
    real = once.mask
    assert torch.equal(source.gather(1, source_2)[real], source_once[real])
    assert torch.equal(twice.shift[real], once.shift[real])
    assert torch.equal(twice.origin[real], once.origin[real])
    assert torch.equal(twice.removed, once.removed)
    positions = prompt_positions(inputs["attention_mask"])
    compact = positions.gather(1, once.origin) - once.shift
    assert torch.equal(compact[real], prompt_positions(once.mask)[real])
    for blocks, row in zip(once.blocks, once.mask, strict=True):
        for block in blocks:
            assert bool(row[block.start : block.stop].all())
            assert len(block) == len(second[block.image])


def test_extended_appends_real_columns() -> None:
    layout = PromptLayout.of(
        torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), [[Block(0, 1, 3)], []], "left"
    )
    new, _ = layout.cut({0: torch.tensor([1])})
    longer = new.extended(2)
    assert longer.mask.tolist() == [[False, False, True, True, True, True], [True] * 6]
    assert longer.origin[:, -2:].tolist() == [[4, 5], [4, 5]]
    assert longer.shift[:, -2:].tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_side_inputs_of_the_prompts_shape_are_cut_alike(side: PaddingSide) -> None:
    prompts = [tiny.prompt(1, I, 5), tiny.prompt(1, 4, 5)]
    inputs = tiny.batch(prompts, tiny.images(1), side)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad(), LMMParts(tiny.tiny_llava()) as parts:
        prepared = prepare(parts, inputs, [UniformPruning(keep_tokens=4)], padding_side=side)
        got = prepared.model_inputs
        ids, mask = got["input_ids"], got["attention_mask"] == 1
        assert torch.equal(got["labels"][mask], ids[mask])
        assert bool((got["labels"][~mask] == -100).all())
        loss = parts.model(**got).loss
    assert bool(torch.isfinite(loss))
