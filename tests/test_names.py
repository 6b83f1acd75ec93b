"""What a model is called when its owner does not say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmlm_efficient import EfficientLMM
from mmlm_efficient.names import POCKET_WEIGHTS, model_name
from mmlm_efficient.prepare import LMMParts
from mmlm_efficient.pruning import VFlowOpt
from mmlm_efficient.pruning.vflowopt_profiles import profile_of
from tests import tiny


def test_a_model_made_from_a_config_is_called_by_its_class() -> None:
    model = tiny.tiny_llava()
    assert model_name(model) == "LlavaForConditionalGeneration"
    assert model_name(model, "mine") == "mine"
    model.config._name_or_path = model.name_or_path = "owner/llava-tiny"
    assert model_name(model) == "owner/llava-tiny"
    with LMMParts(model) as parts:
        assert parts.identity.short_name == "llava-tiny"


def test_the_weights_in_the_package_are_pocket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(POCKET_WEIGHTS)
    monkeypatch.chdir(POCKET_WEIGHTS.parent)
    for name in (str(POCKET_WEIGHTS), f"{POCKET_WEIGHTS}{os.sep}", str(link), "weights"):
        assert model_name(None, name) == "pocket"
    assert model_name(None, "weights/model") == "weights/model"
    assert model_name(None, str(tmp_path)) == str(tmp_path)


def test_a_model_of_transformers_finds_its_profile() -> None:
    model = AutoModelForImageTextToText.from_pretrained(POCKET_WEIGHTS, dtype="float32")
    with EfficientLMM(model, AutoProcessor.from_pretrained(POCKET_WEIGHTS)) as lmm:
        assert lmm.name == "pocket"
        assert lmm.parts.identity.name == "pocket"
        assert profile_of(lmm.parts.identity, 0.25) is not None
        VFlowOpt(keep_ratio=0.25).check_request(lmm.parts.identity, [144])
