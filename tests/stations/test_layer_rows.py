"""Cut and merged rows against plain loops, and what the images of one prompt share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning import FastV, PruningMethod, PyramidDrop, SparseVLM, sparsevlm
from mmlm_efficient.stations.bridge import Block, PromptLayout
from mmlm_efficient.stations.layer import LayerRequest
from mmlm_efficient.stations.layer_rows import LayerCut, Merge, SampleRows, cut_rows, merges_of
from tests import tiny

I = tiny.IMAGE_TOKEN  # noqa: E741


def layout() -> PromptLayout:
    """Two prompts of 9 columns; image 0 in the first, images 1 and 2 in the second."""
    blocks = [[Block(0, 2, 7)], [Block(1, 0, 3), Block(2, 4, 8)]]
    return PromptLayout.of(torch.ones(2, 9), blocks, "left")


@pytest.mark.parametrize("copies", [1, 2])
def test_merged_rows_are_means_of_rows_before_the_cut(copies: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2 * copies, 9, 4, requires_grad=True)
    # Image 0 keeps 1 and two merged tokens, image 1 all, image 2 nothing but a merged one.
    groups = {0: [torch.tensor([3, 0]), torch.tensor([4])], 2: [torch.tensor([2, 0, 3])]}
    keep = {0: torch.tensor([1, 3, 4]), 2: torch.tensor([2])}
    before = layout()
    after, source = before.cut(keep)
    merges = merges_of(before, after, groups)
    assert [merge.sample for merge in merges] == [0, 1]
    got = cut_rows(hidden, source, merges, copies)
    for row in range(2 * copies):
        sample = row // copies
        want = hidden[row, source[sample]].clone()
        for image, own in groups.items():
            blocks = {block.image: block for block in before.blocks[sample]}
            new = {block.image: block for block in after.blocks[sample]}
            if image in blocks:
                for number, group in enumerate(own):
                    place = new[image].stop - len(own) + number
                    rows = hidden[row, group + blocks[image].start]
                    want[place] = rows.sum(dim=0) / (len(group) + 1e-6)
        torch.testing.assert_close(got[row], want)
    # Every row that is left, as it is or in a mean, gets a gradient; others do not.
    got.sum().backward()
    assert hidden.grad is not None
    left = (hidden.grad.abs().sum(dim=-1) > 0)[::copies].tolist()
    assert [place for place, one in enumerate(left[0]) if not one] == [4]
    assert [place for place, one in enumerate(left[1]) if not one] == [5]


def test_merging_leaves_the_input_alone() -> None:
    hidden = torch.arange(8.0).view(1, 4, 2)
    kept = hidden.clone()
    merge = Merge(0, torch.tensor([1]), torch.tensor([2, 3]), torch.tensor([0, 0]))
    shorter = cut_rows(hidden, torch.tensor([[0, 2]]), [merge], 1)
    torch.testing.assert_close(shorter, torch.tensor([[[0.0, 1.0], [5.0, 6.0]]]))
    assert torch.equal(hidden, kept)


def test_images_of_one_prompt_share_a_ratio() -> None:
    LayerRequest(layout(), [LayerCut(1, ratios=(0.5, 0.25, 0.25))], compact=True, gaps=False)
    cut = LayerCut(1, ratios=(0.5, 0.5, 0.25), fixed={})
    message = "decoder layer 1 .* prompt 1 has images with the ratios 0.5, 0.25: give"
    with pytest.raises(SettingsError, match=message):
        LayerRequest(layout(), [cut], compact=True, gaps=False)


@pytest.mark.parametrize(
    ("method", "cuts"),
    [
        (FastV(keep_tokens=5), 1),
        (PyramidDrop(keep_tokens=5), 3),
        (SparseVLM(stage_keep_tokens=(9, 6, 3)), 3),
    ],
)
def test_keys_are_computed_once_for_all_images(
    method: PruningMethod, cuts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    keys = SampleRows.keys

    def counting(self: SampleRows, columns: Tensor) -> Tensor:
        asked.append(len(columns))
        return keys(self, columns)

    rated: list[int] = []

    def rating(text: Tensor, visual: Tensor) -> Tensor:
        rated.append(len(visual))
        return rater_columns(text, visual)

    rater_columns = sparsevlm.rater_columns
    monkeypatch.setattr(SampleRows, "keys", counting)
    monkeypatch.setattr(sparsevlm, "rater_columns", rating)
    prompt = tiny.prompt(1, 5, I, 6, 7, 8, I, 9, 10, I, 31, 12)
    model: Any = tiny.tiny_llava()
    with torch.no_grad(), LMMParts(model) as parts:
        prepared = prepare(parts, tiny.batch([prompt], tiny.images(3)), [method])
        with prepared.active():
            model(**prepared.model_inputs)
            assert len(asked) == cuts
            assert asked[0] == len(prompt)
            assert rated == ([tiny.N_PATCHES] * 3 if isinstance(method, SparseVLM) else [])
            # A second prefill knows nothing of the first.
            model(**prepared.model_inputs)
    assert len(asked) == 2 * cuts
    assert len(rated) in (0, 6)
