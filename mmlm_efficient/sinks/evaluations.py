"""VAR in an attention call at the speed of SDPA: the exact forms, and which one runs when.

Two forms change the text rows after the image; the rows before it run plain SDPA:

- rows (:mod:`mmlm_efficient.sinks.row_maps`): the map of the changed rows only. Any device and
  dtype.
- partial sums (:mod:`mmlm_efficient.sinks.partial_sums`): no map; float32 and float64 on a CPU.

Rows of later images stand between rows that may change: where these are few, they are picked out
of the call, and the rows between them run plain SDPA too.

Shapes: B samples, H query heads, Hkv key heads, Q query rows of the call, T <= Q rows behind the
first that may change (always the last ones), K keys, d head width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.sinks.call import Call, compute_dtype, plain_attention
from mmlm_efficient.sinks.lse import attention_with_lse
from mmlm_efficient.sinks.partial_sums import change_rows
from mmlm_efficient.sinks.redistribution import Decision, Keys, Rule
from mmlm_efficient.sinks.row_maps import write_rows

Form = Literal["rows", "partial_sums"]
Evaluation = Literal["auto", "rows", "partial_sums"]

# Rows that may change are picked out of those between them up to this share.
_PICKED_SHARE = 0.5
# From this size of map on, partial sums are at least as fast on a CPU.
_ROWS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Outcome:
    """Attention of a call, and what was changed in its last T rows.

    Attributes:
        output: [B, H, Q, d] in the query's dtype (a view: [B, Q, H, d] is contiguous).
        selected: bool [B, H, T].
        gain: [B, H, T] factor of the receivers; 1 in rows that are not selected.
        moved: [B, H, T] attention that changed hands; 0 in rows that are not selected.
    """

    output: Tensor
    selected: Tensor
    gain: Tensor
    moved: Tensor


def choose(batch: int, heads: int, rows: int, keys: int, dtype: torch.dtype, device: str) -> Form:
    """The form that ``auto`` takes.

    Args:
        batch, heads, rows, keys: B, H, T, K.
        dtype: of the query.
        device: type of the device, such as "cpu".

    Example:
        >>> choose(1, 32, 60, 671, torch.float32, "cpu")
        'rows'
    """
    if device != "cpu" or dtype not in (torch.float32, torch.float64):
        return "rows"
    return "rows" if batch * heads * rows * keys * dtype.itemsize <= _ROWS_BYTES else "partial_sums"


def worth_picking(changed: int, rows: int) -> bool:
    """Whether ``attend`` should get the rows that may change one by one.

    Args:
        changed: rows that may change.
        rows: all from the first of them to the last row of the call.

    Example:
        >>> worth_picking(60, 60), worth_picking(68, 2364)
        (False, True)
    """
    return changed <= _PICKED_SHARE * rows


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    first_eligible: int,
    keys: Keys,
    eligible: Tensor,
    rule: Rule,
    scaling: float,
    evaluation: Evaluation = "auto",
    row_chunk: int | None = None,
    picked: Tensor | None = None,
) -> Outcome:
    """One attention call: plain SDPA, and VAR in the rows from ``first_eligible`` on.

    Args:
        query: [B, H, Q, d]; key, value: [B, Hkv, K, d], Hkv divides H.
        mask: bool [B or 1, 1, Q, K], True = attend; None: the rows are the last Q of K causal
            positions.
        first_eligible: rows before it run plain SDPA; from 0 to Q.
        keys: flags of the first N <= K keys.
        eligible: bool [B, Q - first_eligible], the rows that may change.
        rule: the thresholds.
        scaling: factor of the scores, such as d ** -0.5.
        evaluation: the form; "auto" takes what :func:`choose` says.
        row_chunk: rows of a map at a time; None: as many as fit into 64 MiB.
        picked: int64 [R], ascending: which of the T rows may change, every one that is eligible
            in any sample; the others run plain SDPA, eligible or not. None: all of them; see
            :func:`worth_picking`.

    Returns:
        Outputs of all Q rows; the rest for the T = Q - first_eligible last rows. Where the
        fraction is 0, and on a CPU where the flags rule out a change, the call is one plain SDPA
        call, to the bit, and nothing is selected.

    Raises:
        SettingsError: shapes do not fit, or an unknown evaluation.
        UnsupportedError: partial sums on a device that is no CPU.
    """
    call = Call(query, key, value, mask, scaling)
    _check(call, first_eligible, keys, eligible, row_chunk)
    _check_evaluation(evaluation, query)
    if picked is not None and (picked.dtype != torch.long or picked.ndim != 1):
        raise SettingsError(f"picked is {picked.dtype} {list(picked.shape)}; it must be int64 [R]")
    rows, device = call.rows - first_eligible, query.device.type
    changed = rows if picked is None else len(picked)
    if evaluation == "auto":
        shape = (query.shape[0], query.shape[1], changed, call.keys)
        evaluation = choose(*shape, query.dtype, device)
    with _no_autocast(device):
        idle = changed == 0 or rule.redistribute_fraction == 0
        if idle or (device == "cpu" and keys.inert(rule)):
            return _untouched(plain_attention(call), rows)
        late = _Late(call, first_eligible, picked, eligible)
        if evaluation == "partial_sums":
            return _partial_sums(late, keys, rule)
        return _rows(late, keys, rule, row_chunk)


def rows_form(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    keys: Keys,
    eligible: Tensor,
    rule: Rule,
    scaling: float,
    *,
    row_chunk: int | None = None,
) -> Outcome:
    """VAR of T rows by their map; arguments as in :func:`attend`, with Q = T.

    Never short-circuits: rows that are not selected get this form's own plain attention.
    """
    call = Call(query, key, value, mask, scaling)
    _check(call, 0, keys, eligible, row_chunk)
    if call.rows == 0:
        return _untouched(call.empty_output(), 0)
    with _no_autocast(query.device.type):
        return _rows(_Late(call, 0, None, eligible), keys, rule, row_chunk)


def partial_sums_form(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    keys: Keys,
    eligible: Tensor,
    rule: Rule,
    scaling: float,
) -> Outcome:
    """VAR of T rows by partial sums; arguments as in :func:`attend`, with Q = T."""
    call = Call(query, key, value, mask, scaling)
    _check(call, 0, keys, eligible, None)
    _check_evaluation("partial_sums", query)
    with _no_autocast(query.device.type):
        return _partial_sums(_Late(call, 0, None, eligible), keys, rule)


@dataclass(frozen=True)
class _Late:
    """The rows of a call that may change; see `attend`."""

    whole: Call
    first: int
    picked: Tensor | None
    eligible: Tensor

    @property
    def count(self) -> int:
        """T."""
        return self.whole.rows - self.first

    @cached_property
    def index(self) -> Tensor | None:
        """Their places among the rows of the call, where they are picked."""
        return None if self.picked is None else self.picked + self.first

    def call(self) -> tuple[Call, Tensor]:
        """The call and the eligibility [B, R] of these rows alone."""
        if self.picked is None or self.index is None:
            return self.whole.after(self.first), self.eligible
        return self.whole.pick(self.index), self.eligible.index_select(1, self.picked)

    def outcome(self, output: Tensor, decision: Decision) -> Outcome:
        """Of all T rows."""
        if self.picked is not None:
            decision = decision.spread(self.picked, self.count)
        return Outcome(output, decision.selected, decision.gain, decision.moved)


def _rows(late: _Late, keys: Keys, rule: Rule, row_chunk: int | None) -> Outcome:
    """Plain attention, and the map of the late rows."""
    (call, eligible), groups = late.call(), keys.groups(rule)
    if late.index is not None:
        output, room = plain_attention(late.whole), call.empty_output()
        decision = write_rows(call, groups, eligible, rule, row_chunk, room)
        output.index_copy_(2, late.index, room)
        return late.outcome(output, decision)
    output = late.whole.empty_output()
    if late.first:
        output[:, :, : late.first] = plain_attention(late.whole.before(late.first))
    room = output[:, :, late.first :]
    return late.outcome(output, write_rows(call, groups, eligible, rule, row_chunk, room))


def _partial_sums(late: _Late, keys: Keys, rule: Rule) -> Outcome:
    """Ordinary attention of all rows; the late ones are then changed."""
    output, lse = attention_with_lse(late.whole)
    if late.count == 0 or keys.inert(rule):
        return _untouched(output, late.count)
    (call, eligible), groups = late.call(), keys.groups(rule)
    if late.index is None:
        room, own = output[:, :, late.first :], lse[:, :, late.first :]
        return late.outcome(output, change_rows(call, groups, eligible, rule, room, own))
    room, own = output.index_select(2, late.index), lse.index_select(2, late.index)
    decision = change_rows(call, groups, eligible, rule, room, own)
    output.index_copy_(2, late.index, room)
    return late.outcome(output, decision)


def _untouched(output: Tensor, rows: int) -> Outcome:
    """Plain attention as an outcome with T = ``rows``."""
    gain = output.new_ones(*output.shape[:2], rows, dtype=compute_dtype(output.dtype))
    return Outcome(output, torch.zeros_like(gain, dtype=torch.bool), gain, torch.zeros_like(gain))


def _no_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast would make the map half precision."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _check_evaluation(evaluation: Evaluation, query: Tensor) -> None:
    """Raises an error for a form that is unknown or does not run here."""
    if evaluation not in ("auto", "rows", "partial_sums"):
        raise SettingsError(f'evaluation is {evaluation!r}; give "auto", "rows" or "partial_sums"')
    if evaluation == "partial_sums" and query.device.type != "cpu":
        raise UnsupportedError(
            f'evaluation "partial_sums" runs on the CPU, and the model is on {query.device}; '
            'use "auto" or "rows"'
        )


def _check(call: Call, first: int, keys: Keys, eligible: Tensor, row_chunk: int | None) -> None:
    """Raises SettingsError for shapes that do not fit."""
    batch, heads = call.query.shape[:2]
    flags, mask = tuple(keys.visual.shape), call.mask
    if heads % call.key.shape[1]:
        raise SettingsError(
            f"{heads} query heads cannot be grouped by {call.key.shape[1]} key heads"
        )
    if not 0 <= first <= call.rows:
        raise SettingsError(f"first_eligible is {first}; give a row from 0 to {call.rows}")
    if tuple(eligible.shape) != (batch, call.rows - first) or eligible.dtype != torch.bool:
        raise SettingsError(
            f"eligible is {eligible.dtype} {list(eligible.shape)}; it must be bool "
            f"[{batch}, {call.rows - first}]"
        )
    if flags[0] != batch or flags[1] > call.keys:
        raise SettingsError(
            f"flags are {list(flags)}; they must be [{batch}, N] with N at most {call.keys} keys"
        )
    shape = (1, call.rows, call.keys)
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape[1:]) != shape):
        raise SettingsError(
            f"mask is {mask.dtype} {list(mask.shape)}; it must be bool [{batch} or 1, 1, "
            f"{call.rows}, {call.keys}], or None for causal rows"
        )
    if mask is None and call.rows > call.keys:
        raise SettingsError(f"{call.rows} causal rows cannot be the last of {call.keys} keys")
    if row_chunk is not None and row_chunk < 1:
        raise SettingsError(f"row_chunk is {row_chunk}; give a whole number from 1")
