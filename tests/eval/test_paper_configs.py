"""The evaluation presets: they load, their numbers are the papers', their tasks exist."""

from __future__ import annotations

import functools
from importlib.metadata import version
from importlib.util import find_spec

import pytest

from eval.plan import EvalConfig, Job, eval_preset_names, load_eval_config
from eval.task_index import look_up
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.pruning.pyramiddrop import PyramidDrop, stage_counts
from mmlm_efficient.pruning.sparsevlm import SparseVLM
from mmlm_efficient.pruning.visionzip import VisionZip
from mmlm_efficient.settings import load_config

PAPERS = ("paper_flowcut", "paper_var", "paper_vflowopt", "paper_video_xl_2")


@functools.cache
def config(name: str) -> EvalConfig:
    return load_eval_config(name, lenient=True)


def run(name: str, run_name: str) -> Job:
    return next(job for job in config(name).runs if job.run == run_name)


def number(job: Job, task: str, row: str) -> float | None:
    return {**job.expected, **job.not_compared}[task].get(row)


def test_all_presets_are_there() -> None:
    assert eval_preset_names() == sorted((*PAPERS, "pocket"))


def test_pocket_runs_here() -> None:
    (job,) = load_eval_config("pocket").jobs()
    assert (job.run, job.model.model, job.batch_size) == ("pocket", "pocket", 8)
    assert [row.label for row in job.rows] == ["none"] + [
        f"{method}:{share}"
        for method in ("flowcut", "vflowopt", "divprune", "random")
        for share in (0.25, 0.125)
    ]
    assert [name for group in job.tasks for name in group] == [
        *("mmlm_pocket_vqa", "mmlm_pocket_video")
    ]


@pytest.mark.parametrize("name", PAPERS)
def test_shape_of_a_paper(name: str) -> None:
    for job in config(name).runs:
        assert "/" in job.model.model
        assert job.expected_source
        for task, rows in {**job.expected, **job.not_compared}.items():
            assert rows, f"{job.run}: no number for {task}"
            assert task in job.metric
            assert all(task in job.notes for task in job.not_compared)
        labels = {row.label for row in job.rows}
        named = {label for rows in job.expected.values() for label in rows}
        assert named <= labels
        assert labels - named <= {"none"}  # a row without any number has no place in the matrix


@pytest.mark.parametrize("name", ["paper_flowcut", "paper_vflowopt"])
def test_papers_of_methods_that_are_here(name: str) -> None:
    assert load_eval_config(name).jobs()


@pytest.mark.parametrize(
    ("run_name", "row", "numbers"),
    [
        # Table of LLaVA-1.5-7B: GQA, MMB, MMB-CN, MME, POPE, SQA, VQAv2, TextVQA, VizWiz, SEED,
        # MM-Vet, LLaVA-Bench.
        ("llava-1.5-7b", "none", "61.9 64.7 58.1 1862 85.9 69.5 78.5 58.2 50.0 59.3 31.1 66.9"),
        (
            "llava-1.5-7b",
            "flowcut:128",
            "58.5 62.1 56.5 1792 85.2 68.6 76 57.3 52.2 56.2 32.5 67.5",
        ),
        ("llava-1.5-7b", "visionzip:64", "55.1 60.1 55.3 1687 77 69 72.4 55.5 52.8 52.2 31.5 62.9"),
        (
            *("llava-1.5-7b", "pyramiddrop-64"),
            "47.5 58.8 50.5 1561 55.9 68.6 69.2 50.6 50.7 40 30.7 59.2",
        ),
        (
            *("llava-1.5-7b", "sparsevlm:192"),
            "57.6 62.5 53.7 1721 83.6 68.9 75.6 56.1 50.5 55.8 31.5 66.1",
        ),
        ("llava-1.5-7b", "fastv:128", "49.6 56.1 56.4 1490 59.6 60.2 61.8 50.6 51.3 55.9 28.1 52"),
        ("llava-1.5-7b", "flowcut:32", "52.1 - - - 69.6 68.7 66.9 53 52.3 - - -"),
        # LLaVA-NeXT-7B: GQA, MMB, MMB-CN, MME, POPE, VQAv2, TextVQA, SEED.
        ("llava-next-7b", "none", "64.2 67.9 60.6 1846 86.4 81.8 61.3 63.6"),
        ("llava-next-7b", "flowcut-160", "57.6 62.8 55.2 1746 79.9 74.6 57.6 56.8"),
        ("llava-next-7b", "visionzip-320", "59.2 63.1 55.3 1702 82.1 76.2 58.9 58.2"),
        # Qwen2-VL-7B: GQA, MMB, MMB-CN, MME, POPE, SQA, TextVQA.
        ("qwen2-vl-7b", "none", "61.9 79.9 79.5 2338 87.2 85.1 82.2"),
        ("qwen2-vl-7b", "flowcut:0.111", "56.4 72.6 72.5 2252 81.8 78.2 68.9"),
    ],
)
def test_numbers_of_flowcut(run_name: str, row: str, numbers: str) -> None:
    job = run("paper_flowcut", run_name)
    tasks = [name for group in job.tasks for name in group]
    wanted = [None if one == "-" else float(one) for one in numbers.split()]
    assert [number(job, task, row) for task in tasks] == wanted


def test_number_of_numbers() -> None:
    counts = {
        name: sum(
            len(rows)
            for job in config(name).runs
            for rows in (*job.expected.values(), *job.not_compared.values())
        )
        for name in PAPERS
    }
    # 16 rows of 12 and 3 of 6; 7 of 8; 4 of 7.
    assert counts["paper_flowcut"] == 16 * 12 + 3 * 6 + 7 * 8 + 4 * 7
    assert counts["paper_vflowopt"] == (1 + 4 + 7 + 6) + (3 + 2 + 1 + 1)
    assert counts["paper_var"] == 2 * (4 + 2 + 4 + 2)
    assert counts["paper_video_xl_2"] == 3 * 4


@pytest.mark.parametrize(
    ("name", "run_name", "task", "row", "wanted"),
    [
        ("paper_vflowopt", "released", "chartqa", "none", 80.04),
        ("paper_vflowopt", "released", "mme", "vflowopt:0.1", 1467.5),
        ("paper_vflowopt", "released", "scienceqa_img", "vflowopt:0.5", 95.24),
        ("paper_vflowopt", "released", "gqa", "vflowopt:0.25", 61.07),
        ("paper_vflowopt", "released", "vizwiz_vqa_val", "vflowopt:0.1", 57.59),
        ("paper_vflowopt", "ablation", "pope", "no-recycling", 86.8),
        ("paper_vflowopt", "ablation", "mmstar", "one-stage", 56.0),
        ("paper_var", "paper", "vizwiz_vqa_val", "var", 53.7),
        ("paper_var", "paper", "mmvet", "none", 31.1),
        ("paper_var", "released-config", "mme", "var", 1433.9),
        ("paper_var", "released-config", "textvqa_val", "none", 47.71),
        ("paper_var", "chair-7b-512", "coco_cap_chair", "var", 60.0),
        ("paper_var", "chair-13b-64", "coco_cap_chair", "none", 24.0),
        ("paper_var", "captions-7b", "detailcaps", "var", 52.98),
        ("paper_video_xl_2", "mlvu", "mlvu_dev", "none", 73.87),
        ("paper_video_xl_2", "videomme", "videomme", "two-level", 66.63),
        ("paper_video_xl_2", "lvbench", "lvbench", "chunked", 46.61),
        ("paper_video_xl_2", "longvideobench", "longvideobench_val_v", "two-level", 60.96),
    ],
)
def test_other_numbers(name: str, run_name: str, task: str, row: str, wanted: float) -> None:
    assert number(run(name, run_name), task, row) == wanted


@pytest.mark.parametrize(
    ("row", "preset"),
    [
        *((f"flowcut:{budget}", f"flowcut-llava15-{budget}") for budget in (192, 128, 64, 32)),
        *((f"flowcut-{budget}", f"flowcut-llavanext-{budget}") for budget in (640, 320, 160)),
        *((f"visionzip:{budget}", f"visionzip-llava15-{budget}") for budget in (192, 128, 64)),
        *((f"sparsevlm:{budget}", f"sparsevlm-llava15-{budget}") for budget in (192, 128, 64)),
    ],
)
def test_rows_do_what_the_presets_do(row: str, preset: str) -> None:
    (ours,) = next(
        one.methods for job in config("paper_flowcut").runs for one in job.rows if one.label == row
    )
    (theirs,) = load_config(preset).methods
    assert _does(ours) == _does(theirs)


def _does(method: Method) -> object:
    """What presets write out and rows leave to the budget; else the settings."""
    if isinstance(method, VisionZip):
        assert isinstance(method.keep_tokens, int)
        return method.keep_tokens, method.split(method.keep_tokens, has_cls=True)
    return method.stage_counts([576]) if isinstance(method, SparseVLM) else method


# Metrics that lmms-eval gives as shares of 1; all others are percent or points already.
SHARES = {
    *("gqa", "pope", "scienceqa_img", "vqav2_val", "textvqa_val", "vizwiz_vqa_val", "seedbench"),
    *("chartqa", "mmstar", "detailcaps", "lvbench", "longvideobench_val_v"),
}


@pytest.mark.parametrize("name", PAPERS)
def test_scales(name: str) -> None:
    for job in config(name).runs:
        tasks = {*job.expected, *job.not_compared}
        assert job.scale == {task: 100 for task in tasks & SHARES}


def test_pyramiddrop_keeps_the_budget_on_average() -> None:
    for budget in (192, 128, 64):
        (method,) = next(
            one.methods
            for one in run("paper_flowcut", "llava-1.5-7b").rows
            if one.label == f"pyramiddrop-{budget}"
        )
        assert isinstance(method, PyramidDrop)
        assert isinstance(method.keep_tokens, int)
        first, second, third = method.stage_layers or ()
        counts = stage_counts(576, method.keep_tokens, method.keep_tokens / 576, 3)
        layers = (first, second - first, third - second, 32 - third)
        mean = sum(n * kept for n, kept in zip(layers, (576, *counts), strict=True)) / 32
        assert mean == pytest.approx(budget, abs=0.5)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs lmms-eval")
def test_tasks_and_metrics_exist() -> None:
    if version("lmms_eval") != "0.7.3":
        pytest.skip("the presets name the tasks of lmms-eval 0.7.3")
    jobs = [job for name in PAPERS for job in config(name).runs]
    found = look_up({name for job in jobs for group in job.tasks for name in group})
    for job in jobs:
        for name in (name for group in job.tasks for name in group):
            assert found[name].known, name
            assert job.metric[name] in found[name].metrics, name
            assert found[name].datasets
