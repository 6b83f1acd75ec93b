"""What select() may return, when it is called, and reports that do not depend on batch mates."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning import FlowCut, KeepMask, PruningMethod
from mmlm_efficient.pruning.base import Station
from mmlm_efficient.tokens import VisualTokens
from tests import tiny

I = tiny.IMAGE_TOKEN  # noqa: E741


class Chosen(PruningMethod):
    """Returns what the test put into `answer`."""

    name: ClassVar[str] = "chosen"
    stations: ClassVar[tuple[Station, ...]] = ("bridge",)

    answer: Any = None

    def select(self, tokens: VisualTokens, budget: int, pixels: Tensor) -> Tensor:
        """The test's answer."""
        result: Tensor = self.answer
        return result


def prepared_with(method: PruningMethod) -> Any:
    """One image, prepared."""
    inputs = tiny.batch([tiny.prompt(1, I, 5)], tiny.images(1))
    with torch.no_grad(), LMMParts(tiny.tiny_llava()) as parts:
        return prepare(parts, inputs, [method])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1, 2, 3], "a tensor of int64 positions"),
        (torch.tensor([1.0, 2.0, 3.0]), "a tensor of int64 positions"),
        (torch.ones(tiny.N_PATCHES, dtype=torch.bool), "a tensor of int64 positions"),
        (torch.tensor([[1, 2, 3]]), "a tensor of int64 positions"),
        (torch.tensor([1, 2]), "exactly 3 positions .*got 2"),
        (torch.arange(tiny.N_PATCHES), f"exactly 3 positions .*got {tiny.N_PATCHES}"),
        (torch.tensor([1, 3, 2]), "ascending order"),
        (torch.tensor([1, 2, 2]), "ascending order"),
        (torch.tensor([-1, 2, 3]), "from 0 to 35 .*got -1 to 3"),
        (torch.tensor([1, 2, 36]), "from 0 to 35 .*got 1 to 36"),
    ],
)
def test_a_wrong_selection_names_the_method(answer: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=f"method 'chosen', image 0: .*{message}"):
        prepared_with(Chosen(keep_tokens=3, answer=answer))


def test_a_right_selection() -> None:
    prepared = prepared_with(Chosen(keep_tokens=3, answer=torch.tensor([4, 8, 35])))
    assert prepared.tokens[0].index.tolist() == [4, 8, 35]


def test_select_is_not_called_with_nothing_to_prune() -> None:
    prepared = prepared_with(Chosen(keep_tokens=tiny.N_PATCHES, answer="never read"))
    assert len(prepared.tokens[0]) == tiny.N_PATCHES


def test_a_mask_is_checked_even_when_it_is_as_large_as_the_image() -> None:
    with pytest.raises(SettingsError, match="names patch 36"):
        prepared_with(KeepMask(mask=list(range(1, tiny.N_PATCHES + 1))))


def test_reports_do_not_depend_on_batch_mates() -> None:
    """An easy target, a hard one and nothing to prune: each reports what it reports alone."""
    budgets, pixels = (20, 4, tiny.N_PATCHES), tiny.images(3)
    prompts = [tiny.prompt(1, I, 5), tiny.prompt(1, I, 6), tiny.prompt(1, I, 7)]
    with torch.no_grad(), LMMParts(tiny.tiny_llava(layers=10)) as parts:
        together = prepare(parts, tiny.batch(prompts, pixels), [FlowCut(keep_tokens=budgets)])
        for image, got in enumerate(together.report().images):
            inputs = tiny.batch([prompts[image]], pixels[image : image + 1])
            alone = prepare(parts, inputs, [FlowCut(keep_tokens=budgets[image])])
            want = alone.report().images[0]
            assert got.layer_counts == want.layer_counts
            assert got.entropy_ratios == pytest.approx(want.entropy_ratios, abs=1e-5)
            if want.scores is None:
                assert image == 2
                assert got.scores is None
                assert got.cut_layer is None
                assert got.layer_counts == ()
                continue
            assert got.scores is not None
            torch.testing.assert_close(got.scores, want.scores, atol=1e-5, rtol=1e-4)
            assert torch.equal(got.cut_layer, want.cut_layer)  # type: ignore[arg-type]
