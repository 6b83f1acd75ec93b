"""Settings of the methods: what is refused, with which words, and what budgets mean."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning import (
    METHODS,
    FlowCut,
    KeepMask,
    NoPruning,
    PruningMethod,
    RandomPruning,
    UniformPruning,
    method_class,
)
from mmlm_efficient.pruning.flowcut import PRESETS

BUDGETED: list[type[PruningMethod]] = [FlowCut, RandomPruning, UniformPruning]


@pytest.mark.parametrize("method", BUDGETED)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give a budget"),
        ({"keep_tokens": 4, "keep_ratio": 0.5}, "both given"),
        ({"keep_tokens": 0}, "integer >= 1"),
        ({"keep_tokens": -3}, "integer >= 1"),
        ({"keep_tokens": True}, "integer >= 1 .*got True"),
        ({"keep_tokens": 2.0}, "integer >= 1 .*got 2.0"),
        ({"keep_tokens": "8"}, "integer >= 1"),
        ({"keep_tokens": ()}, "keep_tokens is empty"),
        ({"keep_tokens": (4, 0)}, "got 0"),
        ({"keep_ratio": 0.0}, r"in \(0, 1\]"),
        ({"keep_ratio": 1.01}, r"in \(0, 1\]"),
        ({"keep_ratio": True}, r"in \(0, 1\]"),
        ({"keep_ratio": float("nan")}, r"in \(0, 1\]"),
        ({"keep_ratio": [0.5, -1]}, "got -1"),
        ({"keep_tokens": 4, "position_ids": "both"}, "position_ids: .*'compact' or 'original'"),
        ({"keep_token": 4}, "unknown setting 'keep_token', did you mean 'keep_tokens'"),
        ({"keep_tokens": 4, "frobnicate": 1}, "unknown setting 'frobnicate'. Valid: keep_tokens"),
    ],
)
def test_refused(method: type[PruningMethod], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        method(**settings)
    assert str(caught.value).startswith(method.name + ":")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_interval": 0}, "prune_interval: .*greater than or equal to 1"),
        ({"prune_interval": 2.0}, "prune_interval"),
        ({"prune_start_layer": -1}, "prune_start_layer"),
        ({"score_momentum": 1.0}, "score_momentum"),
        ({"score_momentum": -0.1}, "score_momentum"),
        ({"score_terms": ()}, "score_terms"),
        ({"score_terms": ("attention", "size")}, "score_terms"),
        ({"relay": "max"}, "relay"),
        ({"crop_sync": "request"}, "crop_sync"),
        ({"schedule": "fixed"}, "schedule"),
        ({"schedule": "static"}, "needs counts"),
        ({"counts": (9, 8)}, "needs counts"),
        ({"schedule": "static", "counts": (9, 12, 8)}, "must not increase"),
        ({"schedule": "static", "counts": (9, 8.5)}, "counts must be an integer"),
        ({"llm_prune_layer": 1}, "belong together"),
        ({"llm_keep_tokens": 4}, "belong together"),
        ({"llm_prune_layer": True, "llm_keep_tokens": 4}, "llm_prune_layer"),
        ({"llm_prune_layer": 1, "llm_keep_tokens": 0}, "llm_keep_tokens must be an integer"),
    ],
)
def test_flowcut_options_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        FlowCut(keep_tokens=8, **settings)


def test_settings_are_frozen_and_serialise() -> None:
    method = FlowCut(keep_tokens=[4, 5], llm_prune_layer=1, llm_keep_tokens=2)
    with pytest.raises(ValidationError):
        method.keep_tokens = 3
    assert FlowCut(**method.model_dump()) == method
    assert method.keep_tokens == (4, 5)


@pytest.mark.parametrize(
    ("ratio", "tokens", "budget"),
    [(0.5, 576, 288), (0.29, 100, 29), (1 / 9, 576, 64), (0.001, 36, 1), (1.0, 36, 36)],
)
def test_ratio(ratio: float, tokens: int, budget: int) -> None:
    assert RandomPruning(keep_ratio=ratio).budget(0, tokens) == budget


@given(st.floats(1e-6, 1.0), st.integers(1, 3000))
def test_ratio_is_always_a_valid_budget(ratio: float, tokens: int) -> None:
    assert 1 <= RandomPruning(keep_ratio=ratio).budget(0, tokens) <= tokens


def test_budgets_above_the_count_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mmlm_efficient"):
        assert RandomPruning(keep_tokens=99).budgets([36, 200, 36]) == (36, 99, 36)
        assert RandomPruning(keep_ratio=1.0).budgets([36]) == (36,)
    assert [record.getMessage() for record in caplog.records] == [
        "random: keep_tokens=99 is no less than the tokens of image(s) 0, 2: nothing is pruned"
    ]


def test_budgets_per_image() -> None:
    assert UniformPruning(keep_tokens=(3, 40)).budgets([36, 36]) == (3, 36)
    assert UniformPruning(keep_ratio=(0.5, 0.25)).budgets([36, 36]) == (18, 9)
    with pytest.raises(SettingsError, match=r"keep_tokens has 2 values, but the call has 3"):
        UniformPruning(keep_tokens=(3, 4)).budgets([36] * 3)
    with pytest.raises(SettingsError, match="keep_ratio has 1 values"):
        UniformPruning(keep_ratio=(0.3,)).budgets([36] * 2)


def test_registry() -> None:
    assert list(METHODS) == [
        "none",
        "flowcut",
        "vflowopt",
        "visionzip",
        "vispruner",
        "divprune",
        "fastv",
        "pyramiddrop",
        "sparsevlm",
        "random",
        "uniform",
        "keep_mask",
        "var",
    ]
    assert all(method.name == name for name, method in METHODS.items())
    assert method_class("none") is NoPruning
    with pytest.raises(SettingsError, match="did you mean 'flowcut'.*Known methods: none"):
        method_class("flowcat")


def test_presets() -> None:
    for name, tokens in PRESETS.items():
        assert FlowCut.preset(name) == FlowCut(keep_tokens=tokens)
    with pytest.raises(SettingsError, match="flowcut-llava15-192"):
        FlowCut.preset("flowcut-llava15")


def test_none_and_keep_mask_take_no_budget() -> None:
    with pytest.raises(SettingsError, match="none: takes no settings, got 'keep_tokens'"):
        NoPruning(keep_tokens=4)
    with pytest.raises(SettingsError, match="keep_mask: takes no keep_ratio: the mask says"):
        KeepMask(mask=[1, 2], keep_ratio=0.5)
    with pytest.raises(SettingsError, match="keep_mask: takes no keep_tokens: the mask says"):
        KeepMask(keep_tokens=4)
    with pytest.raises(SettingsError, match="keep_mask: mask is missing: patches to keep"):
        KeepMask()


def test_numbers_of_numpy_become_pythons() -> None:
    method = FlowCut(
        keep_tokens=(np.int64(4), np.int32(5)),
        prune_interval=np.int64(1),
        llm_prune_layer=np.int16(0),
        llm_keep_tokens=np.uint8(3),
        score_momentum=np.float32(0.25),
    )
    assert method == FlowCut(
        keep_tokens=(4, 5),
        prune_interval=1,
        llm_prune_layer=0,
        llm_keep_tokens=3,
        score_momentum=0.25,
    )
    assert isinstance(method.keep_tokens, tuple)
    assert [type(count) for count in method.keep_tokens] == [int, int]
    assert type(RandomPruning(keep_ratio=np.float32(0.5)).keep_ratio) is float
    for bad in (np.bool_(True), np.float64(4.0), np.int64(0)):
        with pytest.raises(SettingsError, match="integer >= 1"):
            UniformPruning(keep_tokens=bad)


def test_every_field_is_described() -> None:
    for method in METHODS.values():
        for name, field in method.model_fields.items():
            assert field.description, f"{method.name}.{name}"
