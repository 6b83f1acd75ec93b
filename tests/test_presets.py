"""Presets in configs/methods: they load, and hold what their papers publish."""

from __future__ import annotations

import re

import pytest

from mmlm_efficient import (
    VAR,
    DivPrune,
    FastV,
    FlowCut,
    PyramidDrop,
    SparseVLM,
    VFlowOpt,
    VisionZip,
    VisPruner,
    load_config,
)
from mmlm_efficient.presets import preset_folder
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.pruning.vflowopt_profiles import named_profile
from mmlm_efficient.settings import preset_names

PUBLISHED: dict[str, Method] = {
    "var-llava15": VAR(min_nonsink_ratio=0.8, task_preset="general"),
    "var-llava15-hallucination": VAR(min_nonsink_ratio=0.5, task_preset="hallucination"),
    "var-llava15-released": VAR(
        min_nonsink_ratio=0.5,
        redistribute_fraction=0.4,
        skip_last_layer=False,
        task_preset="released_config",
    ),
    "visionzip-llava15-192": VisionZip(keep_tokens=192, contextual_tokens=30),
    "visionzip-llava15-128": VisionZip(keep_tokens=128, contextual_tokens=20),
    "visionzip-llava15-64": VisionZip(keep_tokens=64, contextual_tokens=10),
    "sparsevlm-llava15-192": SparseVLM(stage_keep_tokens=(300, 200, 110)),
    "sparsevlm-llava15-128": SparseVLM(stage_keep_tokens=(303, 110, 36)),
    "sparsevlm-llava15-64": SparseVLM(stage_keep_tokens=(66, 30, 17)),
    "fastv-llava15-50": FastV(keep_ratio=0.5, layer=2),
    "divprune-llava15-098": DivPrune(keep_ratio=0.098),
    "vispruner-llava15-128": VisPruner(keep_tokens=128),
    "vispruner-llava15-64": VisPruner(keep_tokens=64),
    "vispruner-llava15-32": VisPruner(keep_tokens=32),
    "pyramiddrop-llava15": PyramidDrop(keep_ratio=0.125, stage_layers=(8, 16, 24)),
    "vflowopt-onevision-50": VFlowOpt(keep_ratio=0.5, profile="onevision-7b-50"),
    "vflowopt-onevision-25": VFlowOpt(keep_ratio=0.25, profile="onevision-7b-25"),
    "vflowopt-onevision-10": VFlowOpt(keep_ratio=0.1, profile="onevision-7b-10"),
    **{
        f"flowcut-llavanext-{tokens}": FlowCut(
            keep_tokens=tokens // 2, llm_prune_layer=1, llm_keep_tokens=tokens
        )
        for tokens in (640, 320, 160)
    },
    **{f"flowcut-llava15-{tokens}": FlowCut(keep_tokens=tokens) for tokens in (192, 128, 64, 32)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_holds_the_published_settings(name: str) -> None:
    assert load_config(name).methods == (PUBLISHED[name],)


def test_every_preset_is_listed_and_says_what_it_is() -> None:
    files = {file.stem: file for file in preset_folder("methods").glob("*.yaml")}
    assert set(files) == set(PUBLISHED)
    assert set(files) <= set(preset_names())
    for file in files.values():
        comment, first, *_ = file.read_text(encoding="utf-8").splitlines()
        assert comment.startswith("# ")
        assert len(comment) <= 100
        assert first == "methods:"


@pytest.mark.parametrize("tokens", [192, 128, 64])
def test_defaults_give_the_presets_of_a_nominal_budget(tokens: int) -> None:
    preset = PUBLISHED[f"sparsevlm-llava15-{tokens}"]
    assert isinstance(preset, SparseVLM)
    assert SparseVLM(keep_tokens=tokens).stage_counts([576]) == [preset.stage_keep_tokens]
    assert VisionZip(keep_tokens=tokens).split(tokens, has_cls=True) == VisionZip(
        keep_tokens=tokens, contextual_tokens=tokens * 10 // 64
    ).split(tokens, has_cls=True)


@pytest.mark.parametrize("tokens", [192, 128, 64])
def test_the_tokens_that_a_preset_names(tokens: int) -> None:
    name = f"sparsevlm-llava15-{tokens}"
    comment = (preset_folder("methods") / f"{name}.yaml").read_text(encoding="utf-8")
    mean = re.search(r"nominally (\d+), ([\d.]+) per decoder layer", comment)
    assert mean is not None
    assert int(mean[1]) == tokens
    counts = load_config(name).methods[0].stage_counts([576])[0]  # type: ignore[attr-defined]
    left, per_layer = 576, []
    for layer in range(32):
        per_layer.append(left)
        if layer in (2, 6, 15):
            kept = counts[(2, 6, 15).index(layer)]
            left = kept + (3 * (left - kept) // 10 + 1) // 10 + 1
    assert abs(sum(per_layer) / 32 - float(mean[2])) <= 0.06


@pytest.mark.parametrize("percent", [50, 25, 10])
def test_released_profiles_have_the_budget_of_their_preset(percent: int) -> None:
    method = PUBLISHED[f"vflowopt-onevision-{percent}"]
    assert isinstance(method, VFlowOpt)
    assert named_profile(method.profile).keep_ratio == method.keep_ratio == percent / 100
