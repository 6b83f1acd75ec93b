"""The schema of evaluations: every written form, and every refusal with its place."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.plan import (
    EvalConfig,
    Job,
    check_task_keys,
    config_from_options,
    eval_preset_names,
    load_eval_config,
)
from eval.rows import Row, budgets_from, rows, rows_from_text, split_outside
from eval.schema import tasks_from_text
from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning.fastv import FastV
from mmlm_efficient.pruning.flowcut import FlowCut
from mmlm_efficient.pruning.random_pruning import RandomPruning

TASKS = ["mmlm_pocket_vqa"]


def refuse(*parts: str) -> pytest.RaisesExc[SettingsError]:
    """Expect a SettingsError whose message holds all parts."""
    return pytest.raises(SettingsError, check=lambda error: all(p in str(error) for p in parts))


def labels(*entries: Any, budgets: tuple[Any, ...] = ()) -> list[str]:
    return [row.label for row in rows(list(entries), budgets)]


def read(**values: Any) -> Job:
    return EvalConfig.read({"tasks": TASKS, **values}).runs[0]


# -- rows --------------------------------------------------------------------------------------


def test_stock_row_is_first_and_there_once() -> None:
    assert labels() == ["none"]
    assert labels("random:8", "none") == ["none", "random:8"]
    assert rows(["none"])[0] == Row("none")


def test_bare_names_are_repeated_for_each_budget() -> None:
    assert labels("flowcut", "random:8", "none", budgets=(0.5, 36)) == [
        *("none", "flowcut:0.5", "flowcut:36", "random:8")
    ]
    both = rows([["flowcut", "fastv"]], [0.5])[1]
    assert both.label == "flowcut:0.5+fastv:0.5"
    assert both.methods == (FlowCut(keep_ratio=0.5), FastV(keep_ratio=0.5))
    own = rows([{"label": "mine", "methods": "random"}], [0.5, 8])
    assert [row.label for row in own] == ["none", "mine:0.5", "mine:8"]


def test_one_token_and_the_ratio_one_differ() -> None:
    one, whole = rows(["random"], budgets_from([1, 1.0]))[1:]
    assert (one.label, whole.label) == ("random:1", "random:1.0")
    assert one.methods == (RandomPruning(keep_tokens=1),)
    assert whole.methods == (RandomPruning(keep_ratio=1.0),)


@pytest.mark.parametrize(
    ("entry", "label"),
    [
        ("flowcut:36", "flowcut:36"),
        (" flowcut : 0.250 ", "flowcut:0.25"),
        ({"name": "flowcut", "keep_tokens": 36}, "flowcut:36"),
        ({"name": "flowcut", "keep_tokens": 36, "keep_ratio": None}, "flowcut:36"),
        (
            {"name": "flowcut", "keep_tokens": 64, "position_ids": "original"},
            "flowcut:64(position_ids=original)",
        ),
        ("flowcut:72 + fastv:36", "flowcut:72+fastv:36"),
        (
            ["divprune:8", {"name": "fastv", "keep_ratio": 0.5, "layer": 3}],
            "divprune:8+fastv:0.5(layer=3)",
        ),
        (
            {"name": "sparsevlm", "stage_keep_tokens": [66, 30, 17]},
            "sparsevlm(stage_keep_tokens=[66, 30, 17])",
        ),
        ({"name": "flowcut", "keep_tokens": [8, 4]}, "flowcut(keep_tokens=[8, 4])"),
        (
            {"name": "vflowopt", "keep_ratio": 0.5, "merge_grid_size": False},
            "vflowopt:0.5(merge_grid_size=off)",
        ),
    ],
)
def test_labels_say_everything_and_can_be_read_back(entry: Any, label: str) -> None:
    row = rows([entry])[1]
    assert row.label == label
    assert rows([label])[1].methods == row.methods


def test_own_labels() -> None:
    row = rows([{"label": "tuned", "methods": ["flowcut:72", "fastv:36"]}])[1]
    assert (row.label, row.budgets) == ("tuned", (72, 36))


def test_settings_of_a_row_hold_every_field() -> None:
    settings = rows([{"name": "fastv", "keep_ratio": 0.5}])[1].settings
    assert settings == {
        "fastv": {"keep_tokens": None, "keep_ratio": 0.5, "position_ids": "auto", "layer": 2}
    }
    assert rows([])[0].settings == {}


@pytest.mark.parametrize(
    ("entries", "parts"),
    [
        (["flowcat:8"], ("methods[0]", "flowcat", "'flowcut'")),
        (["random:8", "random:8"], ("methods[1]", "'random:8'", "already")),
        (["none", "none"], ("methods[1]", "'none'")),
        ([{"label": "none", "methods": "random:8"}], ("'none'", "already")),
        (["random"], ("methods[0]", "random:0.25", "budgets")),
        (["random:0"], ("methods[0]", "keep_tokens")),
        (["random:2.0"], ("methods[0]", "(0, 1]")),
        (["random:x"], ("methods[0]", "'x'", "64")),
        (["none:8"], ("methods[0]", "none takes no budget")),
        (["none+random:8"], ("methods[0]", "alone")),
        ([["flowcut:8", "visionzip:8"]], ("methods[0]", "'flowcut'", "'visionzip'", "tower")),
        (["flowcut:8(keep=3)"], ("methods[0]", "'keep'")),
        (["flowcut:8(position_ids)"], ("'position_ids'", "SETTING=VALUE")),
        (["flowcut:8(position_ids=original"], ("lacks", "')'")),
        (["flowcut:8)"], ("')'", "closes nothing")),
        ([8], ("methods[0]", "8")),
        ([[]], ("methods[0]", "no method")),
        ([{"label": "a"}], ("methods[0]", "label: tuned")),
        ([{"labl": "a", "methods": []}], ("'labl'", "'label'")),
        ([{"name": "flowcut", "keep_token": 8}], ("'keep_token'", "'keep_tokens'")),
        ([{"name": "fastv", "keep_ratio": 0.5, "layer": "two"}], ("methods[0]", "layer", "'two'")),
    ],
)
def test_refused_rows(entries: list[Any], parts: tuple[str, ...]) -> None:
    with refuse(*parts):
        rows(entries)


def test_methods_of_other_versions_are_missing_when_lenient() -> None:
    with refuse("methods[0]", "unknown method 'next'"):
        rows(["next"])
    entry = {"name": "next", "task_preset": "general", "keep_ratio": 0.5}
    row = rows([["flowcut:8", entry]], lenient=True)[1]
    assert row.missing is not None
    assert "unknown method 'next'" in row.missing
    assert row.label == "flowcut:8+next:0.5(task_preset=general)"
    assert row.budgets == (8, 0.5)
    assert row.settings["next"] == {"task_preset": "general", "keep_ratio": 0.5}
    with refuse("keep_token"):  # what is known is checked all the same
        rows([["flowcut(keep_token=8)", "next"]], lenient=True)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("0.5,x", ("'x'",)),
        ([True], ("True",)),
        ([None], ("None",)),
        ([0], ("0", "at least 1")),
        ([1.5], ("1.5", "at most 1.0")),
        ([float("nan")], ("nan",)),
        ([0.5, 8, 0.5], ("0.5", "twice")),
        ("0.5,,8", ("nothing",)),
    ],
)
def test_refused_budgets(value: Any, parts: tuple[str, ...]) -> None:
    with refuse("budgets", *parts):
        budgets_from(value)


def test_text_forms() -> None:
    assert rows_from_text("flowcut:64,vflowopt:0.25,none") == [
        "flowcut:64",
        "vflowopt:0.25",
        "none",
    ]
    text = "flowcut:64(score_terms=[attention, semantic], prune_interval=1), none"
    assert len(rows_from_text(text)) == 2
    assert rows(rows_from_text(text))[1].settings["flowcut"]["score_terms"] == [
        *("attention", "semantic")
    ]
    assert tasks_from_text("a, [b,c],d") == ["a", ["b", "c"], "d"]
    assert budgets_from("0.5,64,1.0,1") == (0.5, 64, 1.0, 1)
    with refuse("tasks", "']'", "closes"):
        split_outside("a(b],c", ",", "tasks")


# -- configs -----------------------------------------------------------------------------------


def test_defaults_and_names() -> None:
    job = read()
    assert (job.run, job.seed, job.batch_size, job.limit) == ("pocket", 0, 8, None)
    assert job.model.model == "pocket"
    assert [row.label for row in job.rows] == ["none"]
    assert job.tasks == (("mmlm_pocket_vqa",),)
    assert read(model="llava-hf/llava-1.5-7b-hf").run == "llava-1.5-7b-hf"
    assert read(model="models/ä b:c/").run == "ä-b-c"
    assert read(name="mine").run == "mine"


def test_task_groups() -> None:
    assert read(tasks=["a", ["b", "c"]]).tasks == (("a",), ("b", "c"))
    assert read(tasks="a,[b,c]").tasks == (("a",), ("b", "c"))


def test_model_settings_and_generation() -> None:
    job = read(dtype="bfloat16", device="cuda:1", generation={"max_new_tokens": 4})
    assert (job.model.dtype, job.model.device) == ("bfloat16", "cuda:1")
    assert job.model.generation == {"max_new_tokens": 4}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"task": ["a"]}, ("'task'", "'tasks'")),
        ({"batchsize": 2}, ("'batchsize'", "'batch_size'")),
        ({"tasks": []}, ("tasks", "none")),
        ({"tasks": ["a", ["a"]]}, ("tasks", "'a'", "twice")),
        ({"tasks": [["a", 3]]}, ("tasks", "3")),
        ({"tasks": {"a": 1}}, ("tasks", "list of task names")),
        ({"seed": -1}, ("seed", "greater than or equal to 0", "-1")),
        ({"seed": True}, ("seed", "integer", "True")),
        ({"batch_size": 0}, ("batch_size", "1")),
        ({"limit": 2.5}, ("limit", "integer", "2.5")),
        ({"limit": 0}, ("limit", "1")),
        ({"name": "a/b"}, ("name", "'a/b'", "folder")),
        ({"name": ".."}, ("name", "'..'")),
        ({"metric": {"gqaa": "x"}}, ("metric", "'gqaa'")),
        ({"budgets": [2.0]}, ("budgets", "2.0")),
        ({"include_path": ["nowhere"]}, ("include_path", "nowhere")),
        ({"include_path": 3}, ("include_path", "3")),
        ({"device": "gpu"}, ("device", "'gpu'", "cuda")),
        ({"dtype": "float8"}, ("dtype", "'float8'", "float16")),
        ({"quantization": "int4"}, ("quantization", "'int4'", "int8")),
        ({"attn_implementation": "sdpaa"}, ("attn_implementation", "'sdpa'")),
        ({"generation": {"max_new_token": 3}}, ("generation", "'max_new_tokens'")),
        ({"generation": {"seed": 3}}, ("generation", "seed", "beside")),
        ({"generation": {"num_return_sequences": 2}}, ("num_return_sequences",)),
        ({"generation": {"max_new_tokens": 0}}, ("max_new_tokens", ">= 1")),
        ({"model": ""}, ("model",)),
        ({"methods": 3}, ("methods", "list")),
        ({"runs": {"a": 1}}, ("runs", "list")),
        ({"runs": [{"name": "a"}, {}]}, ("runs[1]", "no name")),
        ({"runs": [{"name": "a"}, {"name": "A"}]}, ("runs[1]", "'A'", "already")),
        ({"runs": [{"name": "a", "sed": 1}]}, ("runs[0]", "'sed'", "'seed'")),
        ({"runs": [{"name": "a", "seed": "x"}]}, ("runs[0]", "seed", "'x'")),
    ],
)
def test_refused_configs(values: dict[str, Any], parts: tuple[str, ...]) -> None:
    with refuse("my.yaml", *parts):
        EvalConfig.read({"tasks": TASKS, **values}, "my.yaml")


def test_tasks_must_be_given() -> None:
    with refuse("tasks", "missing"):
        EvalConfig.read({})


def test_runs_inherit_what_stands_above_them() -> None:
    config = EvalConfig.read(
        {
            "tasks": TASKS,
            "seed": 3,
            "methods": ["random:8"],
            "runs": [{"name": "a"}, {"name": "b", "seed": 4, "methods": ["random:4"]}],
        },
        name="both",
    )
    assert config.name == "both"
    assert [(job.run, job.seed, job.rows[1].label) for job in config.jobs()] == [
        *(("a", 3, "random:8"), ("b", 4, "random:4"))
    ]


# -- published numbers -------------------------------------------------------------------------


def published(**changes: Any) -> dict[str, Any]:
    expected = {
        "source": "paper",
        "tasks": ["gqa", "pope", "mme"],
        "rows": {"none": [61.9, 85.9, 1862], "random:8": [60.1, None, 1836]},
        "scale": {"gqa": 100},
        "notes": {"mme": "a sum"},
        "not_compared": ["mme"],
        **changes,
    }
    return {"tasks": ["gqa", ["pope", "mme"]], "methods": ["random:8"], "expected": expected}


def test_published_numbers_by_task_and_row() -> None:
    job = EvalConfig.read(published()).runs[0]
    assert job.expected == {"gqa": {"none": 61.9, "random:8": 60.1}, "pope": {"none": 85.9}}
    assert job.not_compared == {"mme": {"none": 1862, "random:8": 1836}}
    assert (job.expected_source, job.scale, job.notes) == ("paper", {"gqa": 100}, {"mme": "a sum"})


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"rows": {"none": [1, 2]}}, ("'none'", "2 numbers", "3 tasks")),
        ({"rows": {"random:9": [1, 2, 3]}}, ("rows", "'random:9'", "'random:8'")),
        ({"tasks": ["gqa", "popee", "mme"]}, ("tasks", "'popee'", "'pope'")),
        ({"rows": {"none": [1, 2, float("inf")]}}, ("'none'", "finite")),
        ({"rows": {"none": [1, 2, "3"]}}, ("rows", "'3'")),
        ({"scale": {"gq": 1}}, ("scale", "'gq'", "'gqa'")),
        ({"scale": {"gqa": 0}}, ("scale", "above 0")),
        ({"not_compared": ["mm"]}, ("not_compared", "'mm'")),
        ({"notse": {}}, ("expected", "'notse'", "'notes'")),
        ({"source": ""}, ("source",)),
    ],
)
def test_refused_numbers(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    with refuse("expected", *parts):
        EvalConfig.read(published(**changes))


# -- files -------------------------------------------------------------------------------------


def write(path: Path, values: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
    return path


def test_a_file_names_itself_and_its_folders(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "configs").mkdir()
    path = write(
        tmp_path / "configs" / "my run.yaml", {"tasks": TASKS, "include_path": ["../tasks"]}
    )
    config = load_eval_config(path)
    assert config.name == "my-run"
    assert config.jobs()[0].include_path == (tmp_path / "tasks",)


@pytest.mark.parametrize(
    ("text", "parts"),
    [("[1]", ("list",)), ("a: [", ("YAML",)), ("", ("NoneType",)), ("tsks: []", ("'tsks'",))],
)
def test_refused_files(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with refuse(str(path), *parts):
        load_eval_config(path)


def test_unknown_preset() -> None:
    assert "pocket" in eval_preset_names()
    with refuse("'pockt'", "'pocket'", "Presets:"):
        load_eval_config("pockt")


def test_spelt_out_it_reads_the_same() -> None:
    values = published()
    values["methods"] += [
        "flowcut:8",
        "visionzip:16",
        "divprune:0.5",
        "vispruner:8",
        "uniform:3",
        "pyramiddrop:0.5",
        "sparsevlm:64",
        "divprune:8+fastv:0.5(layer=3)",
        {"label": "own", "methods": "vflowopt:0.25(merge_grid_size=off)"},
    ]
    config = EvalConfig.read({**values, "generation": {"do_sample": True}, "limit": 5})
    again = EvalConfig.read(config.to_dict())
    assert again.runs == config.runs
    assert again.to_dict() == config.to_dict()
    assert again.sha() == config.sha()


def test_jobs_go_to_other_processes() -> None:
    job = EvalConfig.read(published()).jobs()[0]
    assert pickle.loads(pickle.dumps(job)) == job


def test_jobs_refuse_what_only_a_dry_run_lists() -> None:
    config = EvalConfig.read({"tasks": TASKS, "methods": ["next"]}, lenient=True)
    with refuse("pocket", "next", "unknown method"):
        config.jobs()


# -- options -----------------------------------------------------------------------------------


def test_options_alone() -> None:
    config = config_from_options(
        model="models/tiny",
        methods="flowcut,random:8",
        budgets="0.5,4",
        tasks="a,[b,c]",
        limit=3,
        seed=5,
        batch_size=2,
        device="cpu",
        dtype="float32",
        quantization=None,
    )
    job = config.jobs()[0]
    assert [row.label for row in job.rows] == ["none", "flowcut:0.5", "flowcut:4", "random:8"]
    assert (job.run, job.limit, job.seed, job.batch_size) == ("tiny", 3, 5, 2)
    assert job.tasks == (("a",), ("b", "c"))


def test_options_win_over_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "paper.yaml", {**published(), "seed": 1, "limit": 9})
    assert config_from_options(config=path).runs == load_eval_config(path).runs
    job = config_from_options(config=path, seed=2, tasks="mme,gqa").runs[0]
    assert (job.run, job.seed, job.limit) == ("paper", 2, 9)
    assert job.expected == {"gqa": {"none": 61.9, "random:8": 60.1}}
    assert job.not_compared == {"mme": {"none": 1862, "random:8": 1836}}
    job = config_from_options(config=path, methods="flowcut:3").runs[0]
    assert [row.label for row in job.rows] == ["none", "flowcut:3"]
    assert job.expected["gqa"] == {"none": 61.9}
    job = config_from_options(config=path, tasks="other").runs[0]
    assert (job.expected, job.expected_source) == ({}, None)


def test_numbers_belong_to_their_model(tmp_path: Path) -> None:
    path = write(tmp_path / "paper.yaml", published())
    job = config_from_options(config=path, model="some/model").runs[0]
    assert (job.run, job.expected) == ("model", {})


def test_options_of_a_config_with_several_runs() -> None:
    base = EvalConfig.read(
        {
            "tasks": TASKS,
            "methods": ["random"],
            "budgets": [8],
            "runs": [{"name": "a"}, {"name": "b"}],
        },
        name="both",
    )
    config = config_from_options(config=base, limit=2, budgets="4,2")
    assert config.name == "both"
    assert [(job.run, job.limit) for job in config.runs] == [("a", 2), ("b", 2)]
    assert [row.label for row in config.runs[1].rows] == ["none", "random:4", "random:2"]
    assert [job.run for job in config_from_options(config=base, runs=["b"]).runs] == ["b"]
    with refuse("runs", "'c'"):
        config_from_options(config=base, runs=["c"])
    with refuse("model", "a, b"):
        config_from_options(config=base, model="x/y")


def test_include_paths_add_up(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    path = write(tmp_path / "c.yaml", {"tasks": TASKS, "include_path": "one"})
    job = config_from_options(config=path, include_path=[tmp_path / "two"]).runs[0]
    assert job.include_path == (tmp_path / "one", tmp_path / "two")


def test_refused_options() -> None:
    with refuse("options", "'bath_size'", "'batch_size'"):
        config_from_options(tasks="a", bath_size=2)
    with refuse("tasks", "missing"):
        config_from_options()


def test_a_config_keeps_its_name_when_one_run_is_left() -> None:
    base = EvalConfig.read({"name": "both", "tasks": TASKS, "runs": [{"name": "a"}, {"name": "b"}]})
    one = config_from_options(config=base, runs=["a"], limit=3)
    assert (one.name, one.runs[0].run, one.runs[0].limit) == ("both", "a", 3)
    single = EvalConfig.read({"name": "study", "tasks": TASKS, "runs": [{"name": "a"}]})
    assert config_from_options(config=single).name == "study"
    assert EvalConfig.read(config_from_options(config=single).to_dict()).name == "study"
    other = config_from_options(config=single, model="some/model")
    assert (other.name, other.runs[0].run) == ("model", "model"), "it is of another model"


# -- names of groups ---------------------------------------------------------------------------


def test_what_is_said_of_a_group_is_refused() -> None:
    values = published(tasks=["gqa"], rows={"none": [61.9]}, scale={}, notes={}, not_compared=[])
    job = EvalConfig.read({**values, "metric": {"pope": "f1"}}).runs[0]
    own = {name: [name] for name in ("gqa", "pope", "mme")}
    check_task_keys(job, own)
    check_task_keys(job, {**own, "mme": ["one", "two"]})  # of which nothing is said
    with refuse("run pocket", "metric: 'pope' is a group", "[a, b]"):
        check_task_keys(job, {**own, "pope": ["a", "b"]})
    with refuse("expected: 'gqa' is a group", "[c]"):
        check_task_keys(job, {**own, "gqa": ["c"]})
    apart = EvalConfig.read(published()).runs[0]
    with refuse("expected: 'mme' is a group"):
        check_task_keys(apart, {**own, "mme": ["one"]})
