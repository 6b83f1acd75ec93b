"""The fast forms of VAR equal the definition: any shape, mask and sink pattern."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.sinks import lse as lse_module
from mmlm_efficient.sinks import row_maps
from mmlm_efficient.sinks.call import Call, causal_mask, plain_attention
from mmlm_efficient.sinks.evaluations import (
    Evaluation,
    Outcome,
    choose,
)
from mmlm_efficient.sinks.redistribution import Keys, Rule
from tests.sinks.attention_cases import RULE, Case, made

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
FORMS: tuple[Evaluation, ...] = ("rows", "partial_sums")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes, masks, sink patterns and thresholds; mostly small, always float32 or float64."""
    batch = draw(st.integers(1, 3))
    key_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (4, 1)]))
    cached = draw(st.sampled_from([25, 0, 1, 7, 25]))
    rows = draw(st.sampled_from([24, 1, 2, 11, 24, 31]))
    total = cached + rows
    flagged = draw(st.sampled_from([total, total, max(1, total // 2)]))
    first = draw(st.sampled_from([0, 0, rows // 2, rows - 1, rows]))
    ratio = draw(st.sampled_from([0.3, 0.0, 0.1, 0.5, 0.8, 1.0]) | st.floats(0, 1))
    mass = draw(st.sampled_from([0.1, 0.0, 0.2, 0.5, 1.0]) | st.floats(0, 0.6))
    fraction = draw(st.sampled_from([0.6, 0.0, 1.0]) | st.floats(0, 1))
    rule = Rule(ratio, mass, fraction, draw(st.booleans()), draw(st.booleans()))
    case = made(
        seed=draw(st.integers(0, 10**6)),
        batch=batch,
        heads=(key_heads * group, key_heads),
        rows=rows,
        cached=cached,
        width=draw(st.sampled_from([3, 8, 16])),
        images=draw(st.sampled_from([((1, 9),), ((0, 1),), ((2, 6), (8, 12)), ((4, 30),)])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        rule=rule,
        first=first,
        sharpness=draw(st.sampled_from([0.5, 2.0])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    pattern = draw(st.sampled_from(["some", "none", "visual", "all visual", "only text", "many"]))
    visual = case.keys.visual[:, :flagged]
    share = {"none": 0.0, "many": 0.7}.get(pattern, 0.2)
    sink = torch.rand(visual.shape, generator=generator) < share
    sink = {"visual": sink & visual, "all visual": sink | visual, "only text": sink & ~visual}.get(
        pattern, sink
    )
    eligible = case.eligible
    if draw(st.booleans()):
        eligible = eligible & (torch.rand(eligible.shape, generator=generator) < 0.7)
    call = case.call
    padding = draw(st.sampled_from(["none", "left", "right", "holes"]))
    if padding != "none":
        call = replace(call, mask=padded(padding, batch, rows, total, generator))
    return Case(call, Keys(visual, sink), eligible, rule, first)


def padded(kind: str, batch: int, rows: int, total: int, generator: torch.Generator) -> Tensor:
    """Causal masks [B, 1, rows, total] with up to a third of the keys away."""
    positions = torch.arange(total)
    amount = torch.randint(0, total // 3 + 1, (batch, 1), generator=generator)
    there = {
        "left": positions >= amount,
        "right": positions < total - amount,
        "holes": torch.rand(batch, total, generator=generator) < 0.8,
    }[kind]
    return causal_mask(rows, total, there.device) & there[:, None, None]


def assert_equal_to_definition(
    case: Case, outcome: Outcome, late_only: bool = False, terms: int = 1
) -> None:
    """Output and selection, except in rows within 1e-6 of a threshold; terms: rounded results that
    the form adds up, each as exact as an attention of its own."""
    output, selected, near = case.definition()
    # attend() does not decide about rows from which nothing is moved.
    if late_only or case.rule.redistribute_fraction > 0:
        assert torch.equal(outcome.selected | near, selected | near)
    clear = (~near).unsqueeze(-1)
    # A float32 score of 8 is itself known to 1e-6 only, and with it its exponential.
    atol = TOLERANCE[output.dtype] * max(1.0, case.logits().abs().max().item() / 8) * terms
    actual, late = outcome.output, output[:, :, case.first :]
    if not late_only:
        early = output[:, :, : case.first]
        torch.testing.assert_close(actual[:, :, : case.first], early, atol=atol, rtol=0)
        actual = actual[:, :, case.first :]
    torch.testing.assert_close(actual * clear, late * clear, atol=atol, rtol=0)


class TestEqualToTheDefinition:
    @settings(max_examples=300, deadline=None)
    @given(case=cases(), row_chunk=st.sampled_from([None, 1, 5]), small_cache=st.booleans())
    def test_rows(self, case: Case, row_chunk: int | None, small_cache: bool) -> None:
        cache = 1 if small_cache else row_maps._CACHED_BYTES
        with mock.patch.object(row_maps, "_CACHED_BYTES", cache):
            assert_equal_to_definition(case, case.late("rows", row_chunk), late_only=True)
            assert_equal_to_definition(case, case.attend("rows", row_chunk))

    @settings(max_examples=300, deadline=None)
    @given(case=cases())
    def test_partial_sums(self, case: Case) -> None:
        assert_equal_to_definition(case, case.late("partial_sums"), late_only=True, terms=3)
        assert_equal_to_definition(case, case.attend("partial_sums"), terms=3)

    @settings(max_examples=200, deadline=None)
    @given(case=cases(), form=st.sampled_from(FORMS), row_chunk=st.sampled_from([None, 3]))
    def test_picked_rows(self, case: Case, form: Evaluation, row_chunk: int | None) -> None:
        picked = torch.nonzero(case.eligible.any(dim=0)).flatten()
        outcome = case.attend(form, row_chunk, picked)
        assert_equal_to_definition(case, outcome, terms=3 if form == "partial_sums" else 1)
        whole = case.attend(form, row_chunk)
        same = outcome.selected == whole.selected  # others are near a threshold
        torch.testing.assert_close(outcome.moved * same, whole.moved * same, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("seed", range(5))
    def test_a_long_prompt_in_float64(self, form: Evaluation, seed: int) -> None:
        images = ((5, 200), (210, 300))
        sinks = (0, 7, 60, 205, 250, 310)
        case = made(seed, 2, (4, 2), 330, 0, 16, images, sinks, torch.float64, Rule(0.2, 0.05, 0.7))
        outcome = case.attend(form)
        assert 0.1 < outcome.selected.float().mean() < 1
        assert_equal_to_definition(case, outcome)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_sinks_with_almost_all_image_attention(
        self, form: Evaluation, dtype: torch.dtype
    ) -> None:
        case = made(3, rows=30, dtype=dtype, rule=Rule(0.0, 0.0, 1.0))
        # The sinks' keys follow the queries' mean, so that they win by far.
        direction = torch.ones(8, dtype=dtype)
        query = case.call.query + 2 * direction
        key = case.call.key.clone()
        key[:, :, [0, 4, 9]] = 3 * direction
        case = replace(case, call=replace(case.call, query=query, key=key))
        outcome = case.attend(form)
        assert outcome.gain.max() > 1e4
        assert_equal_to_definition(case, outcome)

    @pytest.mark.parametrize("form", FORMS)
    def test_chunked_prefill_and_decode_equal_one_call(self, form: Evaluation) -> None:
        whole = made(4, rows=24, images=((2, 6), (9, 13)), sinks=(0, 3, 10), dtype=torch.float64)
        expected = whole.attend(form)
        visual = whole.keys.visual
        eligible = visual.cumsum(1).bool() & ~visual
        for start, stop in ((6, 11), (11, 23), (23, 24)):
            call, keys = whole.call, whole.keys
            part = Case(
                Call(
                    call.query[:, :, start:stop],
                    call.key[:, :, :stop],
                    call.value[:, :, :stop],
                    None,
                    call.scaling,
                ),
                Keys(keys.visual[:, :stop], keys.sink[:, :stop]),
                eligible[:, start:stop],
                whole.rule,
            )
            outcome = part.attend(form)
            span = slice(start - whole.first, stop - whole.first)
            assert torch.equal(outcome.selected, expected.selected[:, :, span])
            torch.testing.assert_close(outcome.output, expected.output[:, :, start:stop])
        assert expected.selected.any()

    @pytest.mark.parametrize("form", FORMS)
    def test_left_padded_batch_equals_each_alone(self, form: Evaluation) -> None:
        alone = [made(seed, rows=rows, dtype=torch.float64) for seed, rows in ((5, 20), (6, 24))]
        pad = [24 - case.call.rows for case in alone]

        def joined(tensors: list[Tensor], dim: int) -> Tensor:
            sides = [
                [0, 0] * (t.ndim - 1 - dim) + [n, 0] for t, n in zip(tensors, pad, strict=True)
            ]
            return torch.cat([F.pad(t, side) for t, side in zip(tensors, sides, strict=True)])

        there = joined([torch.ones(1, case.call.rows, dtype=torch.bool) for case in alone], 1)
        eligible = [
            F.pad(case.eligible, (case.first + n, 0)) for case, n in zip(alone, pad, strict=True)
        ]
        call = Call(
            joined([case.call.query for case in alone], 2),
            joined([case.call.key for case in alone], 2),
            joined([case.call.value for case in alone], 2),
            causal_mask(24, 24, there.device) & there[:, None, None],
            alone[0].call.scaling,
        )
        keys = Keys(
            joined([case.keys.visual for case in alone], 1),
            joined([case.keys.sink for case in alone], 1),
        )
        outcome = Case(call, keys, torch.cat(eligible)[:, 14:], RULE, 14).attend(form)
        for index, (case, count) in enumerate(zip(alone, pad, strict=True)):
            single = case.attend(form)
            assert single.selected.any()
            torch.testing.assert_close(outcome.output[index, :, count:], single.output[0])

    @pytest.mark.parametrize("form", FORMS)
    def test_rows_that_see_nothing_are_zero(self, form: Evaluation) -> None:
        case = made(7, rows=20, first=0)
        mask = causal_mask(20, 20, torch.device("cpu"))[None, None].clone()
        mask[:, :, 17] = False
        rule = Rule(0.0, 0.0, 0.6, require_visual_sink=False)
        case = replace(case, call=replace(case.call, mask=mask), rule=rule)
        outcome = case.late(form)
        assert not outcome.selected[:, :, 17].any()
        assert (outcome.output[:, :, 17] == 0).all()
        assert torch.isfinite(outcome.output).all()


class TestUnchanged:
    """What must be plain SDPA to the bit."""

    @pytest.mark.parametrize("form", ["auto", *FORMS])
    @pytest.mark.parametrize("why", ["fraction", "no sink", "no image", "only text sinks", "flood"])
    @pytest.mark.parametrize("cached", [0, 6])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_sdpa(self, form: Evaluation, why: str, cached: int, dtype: torch.dtype) -> None:
        case = made(8, batch=2, cached=cached, dtype=dtype)
        visual, sink = case.keys.visual, case.keys.sink
        none = torch.zeros_like(sink)
        changed = {
            "fraction": (case.keys, Rule(0.5, 0.2, 0.0)),
            "no sink": (Keys(visual, none), RULE),
            "no image": (Keys(none, sink), RULE),
            "only text sinks": (Keys(visual, sink & ~visual), RULE),
            "flood": (Keys(visual, sink | visual), RULE),
        }
        keys, rule = changed[why]
        outcome = replace(case, keys=keys, rule=rule).attend(form)
        call = case.call
        mask = None if cached == 0 else causal_mask(call.rows, call.keys, call.key.device)
        expected = F.scaled_dot_product_attention(
            call.query,
            call.key,
            call.value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=call.scaling,
            enable_gqa=True,
        )
        assert torch.equal(outcome.output, expected)
        assert not outcome.selected.any()
        assert not outcome.moved.any()

    @pytest.mark.parametrize("form", FORMS)
    def test_rows_that_are_not_picked_are_sdpa(self, form: Evaluation) -> None:
        case = made(8, batch=2, rows=30)
        picked = torch.tensor([2, 5, case.eligible.shape[1] - 1])
        outcome = case.attend(form, None, picked)
        plain = replace(case, rule=Rule(0.5, 0.2, 0.0)).attend("rows").output
        others = torch.ones(30, dtype=torch.bool)
        others[picked + case.first] = False
        assert outcome.selected[:, :, picked].any()
        assert not outcome.selected[:, :, others[case.first :]].any()
        assert torch.equal(outcome.output[:, :, others], plain[:, :, others])
        everywhere = case.attend(form)
        torch.testing.assert_close(
            outcome.output[:, :, ~others], everywhere.output[:, :, ~others], atol=2e-6, rtol=0
        )
        with pytest.raises(SettingsError, match="picked is"):
            case.attend(form, None, picked.float())

    @pytest.mark.parametrize("form", FORMS)
    def test_unselected_rows_keep_every_bit(self, form: Evaluation) -> None:
        case = made(9, batch=2, rows=30)
        outcome = case.late(form)
        plain = replace(case, rule=Rule(0.5, 0.2, 0.0)).late(form)
        chosen = outcome.selected
        assert chosen.any()
        assert not chosen.all()
        assert torch.equal(outcome.output[~chosen], plain.output[~chosen])
        assert not torch.isclose(outcome.output[chosen], plain.output[chosen]).all(-1).any()
        assert (outcome.gain[~chosen] == 1).all()
        assert (outcome.moved[chosen] > 0).all()

    @pytest.mark.parametrize("form", FORMS)
    def test_rows_of_values_1_stay_1(self, form: Evaluation) -> None:
        case = made(10, rows=30)
        call = replace(case.call, value=torch.ones_like(case.call.value))
        output = replace(case, call=call).attend(form).output
        torch.testing.assert_close(output, torch.ones_like(output), atol=1e-6, rtol=0)


class TestHalfPrecision:
    @pytest.mark.parametrize("rows", [1, 40])
    def test_rows_are_as_exact_as_sdpa(self, rows: int) -> None:
        half = made(
            11, 1, (8, 4), rows, 300, 64, ((5, 250),), (0, 9, 77, 260), torch.bfloat16, first=0
        )
        case = replace(half, rule=Rule(0.2, 0.05, 0.6))
        wide = replace(
            case,
            call=Call(
                *(t.double() for t in (case.call.query, case.call.key, case.call.value)),
                None,
                case.call.scaling,
            ),
        )
        with mock.patch("mmlm_efficient.sinks.call._WIDENED_BYTES", {"cpu": 2**12}):
            outcome = case.late("rows")
        expected, selected, near = wide.definition()
        assert outcome.output.dtype == torch.bfloat16
        assert outcome.gain.dtype == torch.float32
        assert selected.any()
        assert torch.equal(outcome.selected | near, selected | near)
        # The one rounding is that of the output.
        torch.testing.assert_close(outcome.output.double(), expected, rtol=2**-8, atol=1e-6)

    def test_autocast_does_not_round_the_map(self) -> None:
        case = made(12)
        expected = case.attend("rows").output
        with torch.autocast("cpu", torch.bfloat16):
            outcome = case.attend("rows")
        assert torch.equal(outcome.output, expected)


class TestShapes:
    @pytest.mark.parametrize("form", FORMS)
    def test_output_is_laid_out_as_sdpas(self, form: Evaluation) -> None:
        output = made(13, batch=2).attend(form).output
        assert output.shape == (2, 4, 20, 8)
        assert output.transpose(1, 2).is_contiguous()

    def test_other_value_width_takes_the_fallback(self) -> None:
        case = made(19)
        call = replace(case.call, value=case.call.value[..., :5])
        assert not lse_module._kernel_takes(call)
        wide = replace(case, call=call)
        assert_equal_to_definition(wide, wide.attend("partial_sums"))
        assert_equal_to_definition(wide, wide.attend("rows"))

    def test_no_eligible_row_in_the_call(self) -> None:
        case = made(14, first=20)
        outcome = case.attend("auto")
        assert outcome.selected.shape == (1, 4, 0)
        assert torch.equal(outcome.output, plain_attention(case.call))

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("rows", [1, 20])
    def test_nothing_waits_for_a_device(self, masked: bool, rows: int) -> None:
        # Meta tensors hold no numbers: reading one on the host raises.
        case = made(15, rows=rows, cached=20 - rows)
        meta = torch.device("meta")
        mask = causal_mask(rows, 20, meta)[None, None] if masked else None
        tensors = (case.call.query, case.call.key, case.call.value)
        call = Call(*(t.to(meta) for t in tensors), mask, case.call.scaling)
        keys = Keys(case.keys.visual.to(meta), case.keys.sink.to(meta))
        case = Case(call, keys, case.eligible.to(meta), RULE, case.first)
        outcome = case.attend("auto", row_chunk=2)
        assert outcome.output.shape == (1, 4, rows, 8)
        assert outcome.selected.shape == (1, 4, rows - case.first)
        with pytest.raises(UnsupportedError, match='on meta; use "auto" or "rows"'):
            case.attend("partial_sums")

    @pytest.mark.parametrize(
        ("rows", "keys", "dtype", "device", "form"),
        [
            (1, 100_000, torch.float32, "cpu", "rows"),
            (60, 2975, torch.float32, "cpu", "rows"),
            (1000, 2975, torch.float32, "cpu", "partial_sums"),
            (1000, 2975, torch.bfloat16, "cpu", "rows"),
            (1000, 2975, torch.float32, "cuda", "rows"),
        ],
    )
    def test_choose(self, rows: int, keys: int, dtype: torch.dtype, device: str, form: str) -> None:
        assert choose(1, 32, rows, keys, dtype, device) == form

    def test_auto_takes_what_choose_says(self) -> None:
        case = made(16, rows=40)
        with mock.patch("mmlm_efficient.sinks.evaluations._ROWS_BYTES", 0):
            assert torch.equal(case.attend("auto").output, case.attend("partial_sums").output)
        assert torch.equal(case.attend("auto").output, case.attend("rows").output)


class TestWrongInput:
    def test_messages(self) -> None:
        case = made(20)
        call, keys = case.call, case.keys
        longer = Keys(torch.ones(1, 21, dtype=torch.bool), torch.ones(1, 21, dtype=torch.bool))
        square = torch.ones(1, 1, 20, 20, dtype=torch.bool)
        wrong = [
            (replace(case, first=21), "first_eligible is 21; give a row from 0 to 20"),
            (replace(case, eligible=case.eligible[:, 1:]), r"eligible is .* bool \[1, 6\]"),
            (replace(case, keys=longer), r"flags are \[1, 21\]"),
            (replace(case, call=replace(call, mask=square.float())), "mask is torch.float32"),
            (replace(case, call=replace(call, mask=square[..., 1:])), "mask is torch.bool"),
            (replace(case, call=replace(call, query=call.query[:, :3])), "3 query heads cannot"),
            (
                replace(
                    case,
                    call=replace(call, key=call.key[:, :, :9]),
                    keys=Keys(keys.visual[:, :9], keys.sink[:, :9]),
                ),
                "20 causal rows cannot be the last of 9 keys",
            ),
        ]
        for bad, message in wrong:
            with pytest.raises(SettingsError, match=message):
                bad.attend("auto")
        with pytest.raises(SettingsError, match="row_chunk is 0"):
            case.attend("rows", row_chunk=0)
        with pytest.raises(SettingsError, match="evaluation is 'fast'; give \"auto\""):
            case.attend("fast")  # type: ignore[arg-type]
