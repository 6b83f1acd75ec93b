"""Settings: every way in leads to one schema, and typing errors are answered with a hint."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning.flowcut import FlowCut
from mmlm_efficient.pruning.no_pruning import NoPruning
from mmlm_efficient.pruning.random_pruning import RandomPruning
from mmlm_efficient.settings import (
    Config,
    as_methods,
    check_generation,
    check_generation_values,
    load_config,
    parse_method,
    preset_names,
)


def refuse(*parts: str) -> pytest.RaisesExc[SettingsError]:
    """Expect a SettingsError whose message holds all parts."""
    return pytest.raises(SettingsError, check=lambda error: all(p in str(error) for p in parts))


def test_compact_forms() -> None:
    assert parse_method("flowcut:64") == FlowCut(keep_tokens=64)
    assert parse_method("flowcut:0.25") == FlowCut(keep_ratio=0.25)
    assert parse_method(" random : 1.0 ") == RandomPruning(keep_ratio=1.0)
    assert parse_method("none") == NoPruning()


def test_every_form_of_a_method_list() -> None:
    expected = (FlowCut(keep_tokens=8),)
    assert as_methods(None) == ()
    assert as_methods("flowcut:8") == expected
    assert as_methods({"name": "flowcut", "keep_tokens": 8}) == expected
    assert as_methods(FlowCut(keep_tokens=8)) == expected
    assert as_methods([FlowCut(keep_tokens=8), "none"]) == (*expected, NoPruning())


@pytest.mark.parametrize("budget", ["0", "-3"])
def test_budget_below_one(budget: str) -> None:
    with refuse("flowcut", "keep_tokens", ">= 1", budget):
        parse_method(f"flowcut:{budget}")


@pytest.mark.parametrize("budget", ["0.0", "1.5", "nan", "-0.5"])
def test_ratio_out_of_range(budget: str) -> None:
    with refuse("flowcut", "keep_ratio", "(0, 1]"):
        parse_method(f"flowcut:{budget}")


def test_budget_that_is_no_number() -> None:
    with refuse("'many'", "flowcut:64", "flowcut:0.25"):
        parse_method("flowcut:many")


def test_budget_for_a_method_that_takes_none() -> None:
    with refuse("none takes no budget"):
        parse_method("none:64")


def test_method_without_budget() -> None:
    with refuse("give a budget", "keep_tokens", "keep_ratio"):
        parse_method("flowcut")


def test_both_budgets() -> None:
    with refuse("keep_tokens and keep_ratio", "one of them"):
        as_methods({"name": "flowcut", "keep_tokens": 8, "keep_ratio": 0.5})


def test_unknown_method() -> None:
    with refuse("flowcat", "'flowcut'", "random", "uniform"):
        parse_method("flowcat:64")


def test_unknown_option_of_a_method() -> None:
    with refuse("keep_token", "did you mean 'keep_tokens'"):
        as_methods({"name": "flowcut", "keep_token": 64})


def test_method_without_a_name() -> None:
    with refuse("has no name", "name: flowcut"):
        as_methods({"keep_tokens": 64})


@pytest.mark.parametrize("value", [64, [64], 0.5])
def test_not_a_method(value: object) -> None:
    with refuse("methods:", "flowcut:64"):
        as_methods(value)  # type: ignore[arg-type]


def test_generation_names() -> None:
    check_generation(["temperature", "top_p", "num_beams", "max_new_tokens", "logits_processor"])
    with refuse("'temprature'", "'temperature'"):
        check_generation(["temprature"])


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("num_beams", 0, "whole number >= 1"),
        ("num_beams", "two", "whole number >= 1"),
        ("top_k", -1, "whole number >= 0"),
        ("temperature", -1, "number above 0"),
        ("temperature", "hot", "number above 0"),
        ("top_p", 1.5, "above 0 and at most 1"),
        ("repetition_penalty", float("inf"), "number above 0"),
        ("do_sample", 1, "true or false"),
    ],
)
def test_generation_values(name: str, value: object, allowed: str) -> None:
    with refuse(f"{name} must be", allowed, repr(value)):
        check_generation_values({name: value})
    with refuse(f"{name} must be"):
        Config.read({"generation": {name: value}})


def test_temperature_zero_needs_no_sampling() -> None:
    check_generation_values({"temperature": 0})
    with refuse("temperature must be"):
        check_generation_values({"temperature": 0, "do_sample": True})


def test_config_reads_every_field() -> None:
    config = Config.read(
        {
            "model": "some/folder",
            "dtype": "bfloat16",
            "device": "cpu",
            "quantization": "nf4",
            "methods": [{"name": "flowcut", "keep_tokens": 36}, "none"],
            "generation": {"max_new_tokens": 16, "seed": 3},
        }
    )
    assert config.methods == (FlowCut(keep_tokens=36), NoPruning())
    assert config.generation == {"max_new_tokens": 16, "seed": 3}
    assert config.load_options()["source"] == "some/folder"
    assert config.load_options()["quantization"] == "nf4"


def test_config_unknown_key() -> None:
    with refuse("my.yaml", "'methdos'", "'methods'"):
        Config.read({"methdos": []}, "my.yaml")


def test_config_unknown_generation_key() -> None:
    with refuse("generation", "'max_tokens'"):
        Config.read({"generation": {"max_tokens": 3}})


def test_config_generation_that_is_no_mapping() -> None:
    with refuse("generation", "max_new_tokens"):
        Config.read({"generation": [1]})


def test_config_bad_value_names_its_place() -> None:
    with refuse("config: device", "5"):
        Config.read({"device": 5})


def test_config_error_inside_a_method_is_passed_on() -> None:
    with refuse("my.yaml", "keep_tokens", "0"):
        Config.read({"methods": [{"name": "flowcut", "keep_tokens": 0}]}, "my.yaml")


def test_config_file(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("model: pocket\nmethods: [flowcut:0.5]\n")
    assert load_config(path).methods == (FlowCut(keep_ratio=0.5),)
    path.write_text("")
    assert load_config(path) == Config()


@pytest.mark.parametrize(
    ("text", "part"),
    [("model: [pocket", "not valid YAML"), ("- a\n- b\n", "holds list"), ("\xff", "model")],
)
def test_broken_config_file(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(text.encode("latin-1"))
    if text == "\xff":
        part = "cannot be read"
    with refuse("my.yaml", part):
        load_config(path)


def test_presets_are_all_valid() -> None:
    names = preset_names()
    assert {"pocket", *(f"flowcut-llava15-{n}" for n in (192, 128, 64, 32))} <= set(names)
    for name in names:
        assert isinstance(load_config(name), Config)
    assert load_config("flowcut-llava15-64").methods == (FlowCut(keep_tokens=64),)


@pytest.mark.parametrize("budget", ["0.5", "64"])
def test_var_takes_no_budget(budget: str) -> None:
    with refuse("'var:", "var takes no budget", "Write 'var' alone"):
        parse_method(f"var:{budget}")


def test_unknown_preset() -> None:
    with refuse("'flowcut-llava15-65'", "neither a file nor a preset", "flowcut-llava15-64"):
        load_config("flowcut-llava15-65")
