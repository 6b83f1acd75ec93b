"""The definition of VAR: the paper's rule by hand, the reference's arrays, and its invariants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.sinks.redistribution import (
    Keys,
    Rule,
    _sums_by_choice,
    _sums_by_product,
    redistribute,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "var" / "functions.npz"
CASES = ("c0", "c1", "c3")
RULE = Rule(min_nonsink_ratio=0.5, min_image_mass=0.2, redistribute_fraction=0.6)

# Key 0 is a text sink, 1 a visual sink, 2 and 3 are visual, 4 and 5 text; 5 is the row itself.
TOY = torch.tensor([0.30, 0.10, 0.15, 0.25, 0.12, 0.08]).view(1, 1, 1, 6)
TOY_VISUAL = torch.tensor([[False, True, True, True, False, False]])
TOY_SINK = torch.tensor([[True, True, False, False, False, False]])
TOY_KEYS = Keys(TOY_VISUAL, TOY_SINK)
YES = torch.tensor([[True]])


def some_rows(seed: int, rows: int = 40) -> tuple[Tensor, Keys, Tensor]:
    """Causal attention [2, 3, rows, 24 + rows]; visual keys 3 to 19, of which 3, 7 and 12 sink."""
    generator = torch.Generator().manual_seed(seed)
    keys = 24 + rows
    logits = 2 * torch.randn(2, 3, rows, keys, generator=generator)
    logits = logits.masked_fill(~torch.ones(rows, keys).tril(24).bool(), -torch.inf)
    visual, sink = torch.zeros(2, 2, keys, dtype=torch.bool)
    visual[:, 3:20] = True
    sink[:, [0, 3, 7, 12, 21, 30]] = True
    return logits.softmax(-1), Keys(visual, sink), torch.ones(2, rows, dtype=torch.bool)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray[Any, Any]]:
    with np.load(GOLDEN) as file:
        return dict(file)


def golden_keys(arrays: dict[str, np.ndarray[Any, Any]], case: str) -> Keys:
    """The flags of the 26 prompt tokens."""
    begin, length = int(arrays["image_begin"]), int(arrays["image_len"])
    visual, sink = torch.zeros(2, 1, 26, dtype=torch.bool)
    visual[:, begin : begin + length] = True
    sink[:, torch.from_numpy(arrays[f"{case}__sink_indices"])] = True
    return Keys(visual, sink)


def golden_rule(arrays: dict[str, np.ndarray[Any, Any]], case: str) -> Rule:
    """The reference's rho and p are the complements of the paper's."""
    rho, mass, kept = (float(arrays[f"{case}__{name}"]) for name in ("rho_code", "summ", "p_code"))
    return Rule(1 - rho, mass, 1 - kept)


class TestToy:
    def test_by_hand(self) -> None:
        after, selected = redistribute(TOY, TOY_KEYS, YES, RULE)
        expected = torch.tensor([0.12, 0.04, 0.24, 0.40, 0.12, 0.08])
        torch.testing.assert_close(after.flatten(), expected, atol=1e-7, rtol=0)
        assert selected.tolist() == [[[True]]]
        values = torch.arange(1.0, 7.0)
        assert (TOY.flatten() @ values).item() == pytest.approx(3.03, abs=1e-6)
        assert (after.flatten() @ values).item() == pytest.approx(3.60, abs=1e-6)

    @pytest.mark.parametrize(
        ("rule", "expected"),
        [
            (Rule(0.9, 0.2, 0.6), False),  # ratio .8
            (Rule(0.79, 0.2, 0.6), True),
            (Rule(0.5, 0.6, 0.6), False),  # mass .5
            (Rule(0.5, 0.49, 0.6), True),
        ],
    )
    def test_thresholds(self, rule: Rule, expected: bool) -> None:
        after, selected = redistribute(TOY, TOY_KEYS, YES, rule)
        assert selected.item() is expected
        assert torch.equal(after, TOY) is not expected

    def test_the_references_epsilon_lets_a_row_pass(self) -> None:
        # Ratio .8 against .8 + 5e-7: the slack is 3 keys of 1e-6 each.
        ratio = 0.8 + 5e-7
        double = TOY.double()
        assert redistribute(double, TOY_KEYS, YES, Rule(ratio, 0.2, 0.6))[1].item()
        assert not redistribute(double, TOY_KEYS, YES, Rule(0.8 + 2e-5, 0.2, 0.6))[1].item()

    def test_text_sinks_pay_only_where_asked(self) -> None:
        rule = Rule(0.5, 0.2, 0.6, include_text_sinks=False)
        after, _ = redistribute(TOY, TOY_KEYS, YES, rule)
        # .6 of the visual sink's .10 is moved: the receivers gain by 1 + .06/.40.
        expected = torch.tensor([0.30, 0.04, 0.1725, 0.2875, 0.12, 0.08])
        torch.testing.assert_close(after.flatten(), expected, atol=1e-7, rtol=0)

    def test_without_a_visual_sink(self) -> None:
        keys = Keys(TOY_VISUAL, torch.tensor([[True, False, False, False, False, False]]))
        after, selected = redistribute(TOY, keys, YES, RULE)
        assert not selected.any()
        assert torch.equal(after, TOY)
        rule = Rule(0.5, 0.2, 0.6, require_visual_sink=False)
        after, selected = redistribute(TOY, keys, YES, rule)
        assert selected.all()
        # .18 of the text sink's .30 goes to .50 of image attention: factor 1.36.
        expected = torch.tensor([0.12, 0.136, 0.204, 0.34, 0.12, 0.08])
        torch.testing.assert_close(after.flatten(), expected, atol=1e-7, rtol=0)

    def test_a_row_that_is_not_eligible(self) -> None:
        after, selected = redistribute(TOY, TOY_KEYS, ~YES, RULE)
        assert torch.equal(after, TOY)
        assert not selected.any()

    def test_keys_without_flags_are_neither(self) -> None:
        short = Keys(TOY_VISUAL[:, :4], TOY_SINK[:, :4])
        for full, cut in zip(
            redistribute(TOY, TOY_KEYS, YES, RULE), redistribute(TOY, short, YES, RULE), strict=True
        ):
            assert torch.equal(full, cut)

    def test_half_precision_is_decided_in_float32(self) -> None:
        half = TOY.to(torch.bfloat16)
        after, _ = redistribute(half, TOY_KEYS, YES, RULE)
        assert after.dtype == torch.bfloat16
        wide, _ = redistribute(half.float(), TOY_KEYS, YES, RULE)
        assert torch.equal(after, wide.to(torch.bfloat16))


class TestSeen:
    def test_a_sink_after_the_row_does_not_count(self) -> None:
        # Causal: row 0 is key 2, row 1 is key 3; the visual sink is key 3.
        probabilities = torch.tensor([[0.4, 0.3, 0.3, 0.0], [0.2, 0.3, 0.3, 0.2]])[None, None]
        flags = torch.tensor([[False, True, True, True], [True, False, False, True]])
        keys = Keys(flags[:1], flags[1:])
        _, selected = redistribute(probabilities, keys, YES.expand(1, 2), RULE)
        assert selected.flatten().tolist() == [False, True]

    def test_mask_instead_of_causality(self) -> None:
        masked = torch.tensor([[[[True, False, True, True, True, True]]]])
        probabilities = TOY * masked
        _, selected = redistribute(probabilities, TOY_KEYS, YES, RULE, visible=masked)
        assert not selected.any()


class TestGolden:
    @pytest.mark.parametrize("case", CASES)
    def test_prefill(self, arrays: dict[str, np.ndarray[Any, Any]], case: str) -> None:
        before = torch.from_numpy(arrays[f"{case}__attn_before"])[None]
        eligible = (torch.arange(26) >= 16)[None]
        keys, rule = golden_keys(arrays, case), golden_rule(arrays, case)
        after, selected = redistribute(before, keys, eligible, rule)
        expected = torch.zeros(6, 26, dtype=torch.bool)
        expected[tuple(torch.from_numpy(arrays[f"{case}__candidates"]).T)] = True
        expected[:, :16] = False
        assert torch.equal(selected[0], expected)
        reference = torch.from_numpy(arrays[f"{case}__attn_after"])
        torch.testing.assert_close(after[0], reference, atol=5e-7, rtol=0)
        assert bool(selected.any()) is (case != "c3")
        if case == "c3":
            assert torch.equal(after, before)

    @pytest.mark.parametrize("case", CASES)
    def test_decode(self, arrays: dict[str, np.ndarray[Any, Any]], case: str) -> None:
        before = torch.from_numpy(arrays[f"{case}__attn_before_decode"])[None]
        keys, rule = golden_keys(arrays, case), golden_rule(arrays, case)
        after, selected = redistribute(before, keys, YES, rule)
        expected = torch.zeros(6, 1, dtype=torch.bool)
        expected[tuple(torch.from_numpy(arrays[f"{case}__candidates_decode"]).T)] = True
        assert torch.equal(selected[0], expected)
        reference = torch.from_numpy(arrays[f"{case}__attn_after_decode"])
        torch.testing.assert_close(after[0], reference, atol=5e-7, rtol=0)


class TestInvariants:
    @pytest.mark.parametrize("rule", [RULE, Rule(0.0, 0.0, 1.0), Rule(0.8, 0.4, 0.3)])
    def test_what_changes(self, rule: Rule) -> None:
        before, keys, eligible = some_rows(1)
        after, selected = redistribute(before, keys, eligible, rule)
        assert selected.any()
        groups = keys.groups(rule)
        rest = ~(groups.payers | groups.receivers)
        torch.testing.assert_close(after.sum(-1), torch.ones(2, 3, 40), atol=1e-6, rtol=0)
        assert (after >= 0).all()
        assert torch.equal(after[~selected], before[~selected])
        keep = torch.tensor(1 - rule.redistribute_fraction)
        for sample in range(2):
            chosen = selected[sample]
            old, new = before[sample][chosen], after[sample][chosen]
            assert torch.equal(new[:, rest[sample]], old[:, rest[sample]])
            payers = groups.payers[sample]
            assert torch.equal(new[:, payers], old[:, payers] * keep)
            visual = keys.visual[sample]
            assert (new[:, visual].sum(-1) >= old[:, visual].sum(-1) - 1e-6).all()
            # The order within the receivers: all of a row grow by one factor.
            factor = new[:, groups.receivers[sample]] / old[:, groups.receivers[sample]]
            torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-5, atol=0)

    def test_not_every_row_is_selected(self) -> None:
        before, keys, eligible = some_rows(1)
        _, selected = redistribute(before, keys, eligible, RULE)
        assert 0.1 < selected.float().mean() < 0.9

    def test_fraction_0_changes_no_bit(self) -> None:
        before, keys, eligible = some_rows(2)
        after, selected = redistribute(before, keys, eligible, Rule(0.5, 0.2, 0.0))
        assert selected.any()
        assert torch.equal(after, before)

    def test_image_mass_grows_linearly_in_the_fraction(self) -> None:
        before, keys, eligible = some_rows(3)
        receivers = keys.groups(RULE).receivers[:, None, None]
        masses = [
            (redistribute(before.double(), keys, eligible, Rule(0.5, 0.2, p))[0] * receivers).sum(
                -1
            )
            for p in (0.0, 0.25, 0.5, 1.0)
        ]
        torch.testing.assert_close(masses[2] - masses[0], 2 * (masses[1] - masses[0]))
        torch.testing.assert_close(masses[3] - masses[0], 4 * (masses[1] - masses[0]))
        assert (masses[1] - masses[0]).max() > 0.05

    @pytest.mark.parametrize("varied", ["min_nonsink_ratio", "min_image_mass"])
    def test_lower_thresholds_never_unselect(self, varied: str) -> None:
        before, keys, eligible = some_rows(4)
        last: Tensor | None = None
        for value in (1.0, 0.8, 0.5, 0.2, 0.0):
            settings = {"min_nonsink_ratio": 0.5, "min_image_mass": 0.2, varied: value}
            _, selected = redistribute(
                before, keys, eligible, Rule(**settings, redistribute_fraction=0.6)
            )
            if last is not None:
                assert (selected | ~last).all()
            last = selected
        assert last is not None
        assert last.any()

    def test_permuted_image(self) -> None:
        before, keys, eligible = some_rows(5)
        order = torch.arange(64)
        order[3:20] = 3 + torch.randperm(17, generator=torch.Generator().manual_seed(0))
        moved = Keys(keys.visual[:, order], keys.sink[:, order])
        after, _ = redistribute(before, keys, eligible, RULE)
        permuted, _ = redistribute(before[..., order], moved, eligible, RULE)
        torch.testing.assert_close(permuted, after[..., order], atol=1e-7, rtol=0)

    def test_all_visual_tokens_sinks(self) -> None:
        before, keys, eligible = some_rows(6)
        flooded = Keys(keys.visual, keys.sink | keys.visual)
        after, selected = redistribute(before, flooded, eligible, Rule(0.0, 0.0, 0.6))
        assert torch.equal(after, before)
        assert not selected.any()

    def test_receivers_with_next_to_nothing(self) -> None:
        before = torch.tensor([0.5, 0.5, 1e-42, 0.0, 0.0, 0.0]).view(1, 1, 1, 6)
        after, selected = redistribute(before, TOY_KEYS, YES, Rule(0.0, 0.0, 1.0))
        assert torch.equal(after, before)
        assert not selected.any()

    def test_samples_do_not_touch_each_other(self) -> None:
        before, keys, eligible = some_rows(7)
        other = Keys(keys.visual.clone(), keys.sink.clone())
        other.sink[1, 5:9] = True
        together, _ = redistribute(before, other, eligible, RULE)
        for sample in range(2):
            part = slice(sample, sample + 1)
            alone = Keys(other.visual[part], other.sink[part])
            single, _ = redistribute(before[part], alone, eligible[part], RULE)
            torch.testing.assert_close(together[part], single, atol=1e-7, rtol=0)

    def test_the_input_is_left_alone(self) -> None:
        before, keys, eligible = some_rows(8)
        copy = before.clone()
        redistribute(before, keys, eligible, RULE)
        assert torch.equal(before, copy)


def test_both_ways_to_sum() -> None:
    before, keys, _ = some_rows(9)
    weights, members = before.flatten(1, 2), keys.groups(RULE).stacked
    torch.testing.assert_close(
        _sums_by_product(weights, members), _sums_by_choice(weights, members), atol=1e-6, rtol=0
    )


class TestWrongInput:
    @pytest.mark.parametrize(
        "name", ["min_nonsink_ratio", "min_image_mass", "redistribute_fraction"]
    )
    @pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
    def test_threshold_out_of_range(self, name: str, value: float) -> None:
        settings = {"min_nonsink_ratio": 0.5, "min_image_mass": 0.2, "redistribute_fraction": 0.6}
        with pytest.raises(SettingsError, match=f"{name} is {value}; give a number from 0 to 1"):
            Rule(**{**settings, name: value})

    @pytest.mark.parametrize("sink", [TOY_SINK[:, :5], TOY_SINK[0], TOY_SINK.float()])
    def test_flags_of_another_shape(self, sink: Tensor) -> None:
        with pytest.raises(SettingsError, match="sink is .* must be bool"):
            Keys(TOY_VISUAL, sink)
