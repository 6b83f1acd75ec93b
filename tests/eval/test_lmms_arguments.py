"""The --model_args of lmms-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval.lmms_arguments import Arguments, read_arguments
from mmlm_efficient.errors import SettingsError


def parsed(text: str) -> Arguments:
    """As lmms-eval's command line gives them."""
    utils = pytest.importorskip("lmms_eval.utils")
    return read_arguments(utils.simple_parse_args_string(text))


def names(arguments: Arguments) -> list[tuple[str, Any, Any]]:
    return [
        (type(one).__name__, getattr(one, "keep_tokens", None), getattr(one, "keep_ratio", None))
        for one in arguments.model.methods
    ]


def test_nothing_is_the_pocket_model_without_methods() -> None:
    arguments = read_arguments({})
    assert (arguments.model.model, arguments.model.methods) == ("pocket", ())
    assert (arguments.batch_size, arguments.seed) == (1, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("methods=flowcut:64", [("FlowCut", 64, None)]),
        ("methods=[flowcut:64,random:0.5]", [("FlowCut", 64, None), ("RandomPruning", None, 0.5)]),
        ("methods=flowcut:72+random:36", [("FlowCut", 72, None), ("RandomPruning", 36, None)]),
        ('methods=[{"name":"flowcut","keep_tokens":9}]', [("FlowCut", 9, None)]),
        ("method=flowcut,keep_tokens=64", [("FlowCut", 64, None)]),
        ("method=flowcut,keep_ratio=0.25", [("FlowCut", None, 0.25)]),
        ("method=flowcut,keep_ratio=0.25,keep_tokens=None", [("FlowCut", None, 0.25)]),
        ("methods=none", [("NoPruning", None, None)]),
        ("methods=None", [("NoPruning", None, None)]),
        ("method=None", []),
    ],
)
def test_methods(text: str, expected: list[tuple[str, Any, Any]]) -> None:
    assert names(parsed(text)) == expected


def test_settings_of_a_method_keep_their_kinds() -> None:
    [method] = parsed("method=flowcut,keep_tokens=64,position_ids=original").model.methods
    assert method.position_ids == "original"


def test_flat_settings() -> None:
    arguments = parsed(
        "pretrained=/models/7,dtype=float32,device=cpu,quantization=None,vision_tower=/towers/1,"
        "attn_implementation=eager,max_new_tokens=16,seed=5,config_sha=0123456789ab,"
        "max_batch_size=64"
    )
    model = arguments.model
    assert (model.model, model.dtype, model.device) == ("/models/7", "float32", "cpu")
    assert (model.quantization, model.vision_tower) == (None, "/towers/1")
    assert model.attn_implementation == "eager"
    assert model.generation == {"max_new_tokens": 16}
    assert arguments.seed == 5


def test_names_made_of_digits_stay_names() -> None:
    assert parsed("pretrained=7").model.model == "7"


def test_a_config_file_is_the_base(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: somewhere\nmethods: [flowcut:64]\n"
        "generation: {max_new_tokens: 9, num_beams: 2, seed: 4}\n"
    )
    plain = parsed(f"config={file}")
    assert plain.model.model == "somewhere"
    assert names(plain) == [("FlowCut", 64, None)]
    assert plain.model.generation == {"max_new_tokens": 9, "num_beams": 2}
    assert plain.seed == 4
    changed = parsed(f"config={file},pretrained=pocket,method=random,keep_tokens=8,seed=0")
    assert changed.model.model == "pocket"
    assert names(changed) == [("RandomPruning", 8, None)]
    assert changed.seed == 0
    assert parsed(f"config={file},max_new_tokens=3").model.generation["max_new_tokens"] == 3


@pytest.mark.parametrize(("given", "size"), [("4", 4), (8, 8), (None, 1)])
def test_batch_sizes(given: Any, size: int) -> None:
    assert read_arguments({"batch_size": given}).batch_size == size


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretraind": "pocket"}, "'pretraind' is unknown. Did you mean 'pretrained'"),
        ({"keep_tokens": 64}, "'keep_tokens' is a setting of a method.*method=flowcut,keep_tokens"),
        ({"method": "flowcut", "keep_token": 1}, "'keep_token' is unknown.*'keep_tokens'"),
        ({"method": "flowcat"}, "unknown method 'flowcat', did you mean 'flowcut'"),
        ({"methods": "flowcat:3"}, "unknown method 'flowcat', did you mean 'flowcut'"),
        ({"method": "flowcut", "methods": "flowcut:64"}, "exclude each other"),
        ({"methods": "[{name: flowcut"}, "cannot be read"),
        ({"batch_size": "auto"}, "batch_size=auto: finding.*Write a whole number"),
        ({"batch_size": "auto:4"}, "not supported"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"batch_size": "many"}, "batch_size must be a whole number >= 1, got 'many'"),
        ({"max_batch_size": True}, "max_batch_size must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number >= 0, got 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number >= 1"),
        ({"config": "nowhere.yaml"}, "'nowhere.yaml' is neither a file nor a preset"),
    ],
)
def test_arguments_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_arguments(given)
