"""Attention with its log-sum-exp: the kernel and the fallback say the same."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

from mmlm_efficient.sinks import lse as lse_module
from mmlm_efficient.sinks.call import causal_mask, compute_dtype, plain_attention
from mmlm_efficient.sinks.lse import attention_with_lse
from tests.sinks.attention_cases import made


class TestLogSumExp:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize(("rows", "keys"), [(9, 9), (4, 9), (1, 9)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_kernel_and_fallback(
        self, masked: bool, rows: int, keys: int, dtype: torch.dtype
    ) -> None:
        call = made(17, 2, rows=rows, cached=keys - rows, images=((0, 1),), dtype=dtype).call
        mask = causal_mask(rows, keys, call.key.device)
        if masked:
            mask[:, 0] = keys == rows
            mask[0] &= rows == 1
            call = replace(call, mask=mask[None, None])
        output, lse = attention_with_lse(call)
        with (
            mock.patch.object(lse_module, "_KERNEL", None),
            mock.patch.object(lse_module, "_MAP_BYTES", 1),
        ):
            plain, plain_lse = attention_with_lse(call)
        key = call.key.double().repeat_interleave(2, 1)
        logits = (call.query.double() @ key.transpose(-1, -2) * call.scaling).masked_fill(
            ~mask, -math.inf
        )
        seen = mask.any(-1)
        expected = logits.logsumexp(-1)[..., seen]
        atol = 2e-2 if dtype == torch.bfloat16 else 2e-6
        for value in (lse, plain_lse):
            assert value.dtype == compute_dtype(dtype)
            assert torch.isfinite(value).all()
            torch.testing.assert_close(value[..., seen].double(), expected, atol=atol, rtol=0)
        for value in (output, plain):
            assert value.dtype == dtype
            assert (value[:, :, ~seen] == 0).all()
            torch.testing.assert_close(value, plain_attention(call), atol=atol, rtol=0)

    def test_the_kernel_is_there(self) -> None:
        assert lse_module._KERNEL is not None
        assert lse_module._kernel_takes(made(18).call)
