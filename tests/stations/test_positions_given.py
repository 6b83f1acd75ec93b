"""Position ids that the caller gives: renumbered, kept, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlm_efficient.errors import PromptError
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning import FlowCut
from mmlm_efficient.stations.bridge import prompt_positions
from tests import tiny

I = tiny.IMAGE_TOKEN  # noqa: E741
PROMPTS = [tiny.prompt(1, 5, I, 6, 7), tiny.prompt(1, I, 6, I, 9)]


def request(position_ids: Any, rule: str = "compact") -> Any:
    """A padded batch of two prompts with the caller's position ids."""
    inputs = tiny.batch(PROMPTS, tiny.images(3))
    if callable(position_ids):
        position_ids = position_ids(inputs["attention_mask"])
    inputs["position_ids"] = position_ids
    with torch.no_grad(), LMMParts(tiny.tiny_llava()) as parts:
        return prepare(parts, inputs, [FlowCut(keep_tokens=(4, 9, 7), position_ids=rule)])


def test_compact_renumbers_from_the_callers_first_position() -> None:
    prepared = request(lambda mask: prompt_positions(mask) + 3)
    for row, mask in zip(prepared.model_inputs["position_ids"], prepared.layout.mask, strict=True):
        assert row[mask].tolist() == list(range(3, 3 + int(mask.sum())))


def test_original_keeps_the_callers_positions() -> None:
    prepared = request(lambda mask: prompt_positions(mask) * 2, "original")
    for sample, first in ((0, 2), (1, 1)):
        row = prepared.model_inputs["position_ids"][sample][prepared.layout.mask[sample]]
        image = prepared.tokens[sample].index
        assert row[first : first + len(image)].tolist() == (2 * (first + image)).tolist()
        assert int(row[-1]) == 2 * (len(PROMPTS[sample]) - 1)


def test_one_row_for_all_prompts() -> None:
    width = max(len(ids) for ids in PROMPTS)
    got = request(torch.arange(width).unsqueeze(0)).model_inputs["position_ids"]
    assert got.shape == request(None).model_inputs["input_ids"].shape


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.long), "position_ids: expected shape"),
        (torch.zeros(3, 2, 9, dtype=torch.long), "position_ids: expected shape"),
        (torch.arange(76) % 40, "position_ids: expected shape"),
    ],
)
def test_other_shapes_are_refused(positions: Tensor, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        request(positions)


def test_packed_prompts_are_refused() -> None:
    with pytest.raises(PromptError, match="prompt 0 do not ascend"):
        request(lambda mask: prompt_positions(mask) % 30)
