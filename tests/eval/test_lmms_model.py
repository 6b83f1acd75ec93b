"""Our model behind lmms-eval's evaluator and command line."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.engine import Engine
from mmlm_efficient import load
from mmlm_efficient.errors import RunError, SettingsError, UnsupportedError
from mmlm_efficient.pocket import scene
from mmlm_efficient.settings import as_methods
from tests.eval.lmms_local import (
    F,
    messages_of,
    only_local,
    request,
    texts,
    write_data,
    write_task,
)

pytest.importorskip("lmms_eval")

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models.model_utils import gen_metrics
from lmms_eval.tasks import TaskManager

from eval.find_tasks import bundled_folder, find_tasks
from eval.lmms_model import EfficientChatModel
from eval.lmms_plugin import manifests
from eval.lmms_task import lmms_tasks
from eval.local_task import LocalTask

SHORT = {"max_new_tokens": 12, "do_sample": False}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> EfficientChatModel:
    return EfficientChatModel(pretrained="pocket", batch_size="4", methods="flowcut:36")


@pytest.fixture
def asking(model: EfficientChatModel) -> Iterator[EfficientChatModel]:
    """The model with twelve documents in task "t" and "u", which are their own numbers."""
    model.task_dict = {name: {"test": list(range(12))} for name in ("t", "u")}
    gen_metrics.reset_logged_metrics()
    yield model
    gen_metrics.reset_logged_metrics()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_data(folder)
    write_task(folder, "mmlm_t")
    write_task(
        folder,
        "mmlm_u",
        doc_to_messages=F("doc_to_messages"),
        generation_kwargs={"max_new_tokens": 3, "do_sample": False, "until": [" "]},
    )
    return folder


def question(doc: int, words: str = "what is in the picture?") -> list[dict[str, Any]]:
    image = {"type": "image", "url": scene("heldout", doc).image}
    return messages_of(image, {"type": "text", "text": words})


def evaluate(model: Any, folder: Path, tasks: list[str], **settings: Any) -> dict[str, Any]:
    result: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        process_docs_parallel=1,
        **settings,
    )
    return result


def answers(result: dict[str, Any], task: str) -> list[str]:
    return [sample["filtered_resps"][0] for sample in result["samples"][task]]


def test_lmms_eval_and_the_runner_give_the_same(
    model: EfficientChatModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_local(monkeypatch)
    result = evaluate(model, folder, ["mmlm_t", "mmlm_u"])
    with load("pocket") as lmm:
        engine = Engine(lmm)
        for name in ("mmlm_t", "mmlm_u"):
            [task] = lmms_tasks(name, [folder])
            samples = [task.sample(id) for id in task.ids]
            outcomes = engine.answer(samples, as_methods("flowcut:36"))
            own = [outcome.text for outcome in outcomes]
            assert answers(result, name) == own
            scores = [task.score(one.id, one.text or "") for one in outcomes]
            for metric in task.metrics:
                score = task.aggregate(metric.name, [one[metric.name] for one in scores])
                assert result["results"][name][f"{metric.name},none"] == score
            assert task.version == str(result["versions"][name])
    assert 0 < result["results"]["mmlm_t"]["right,none"] < 1
    assert all(" " not in text for text in answers(result, "mmlm_u"))


def test_a_bundled_task_gives_the_same(model: EfficientChatModel) -> None:
    [task] = find_tasks("mmlm_pocket_vqa")
    result = evaluate(model, bundled_folder(), ["mmlm_pocket_vqa"], limit=12)
    outcomes = Engine(load("pocket")).answer(
        [task.sample(id) for id in task.ids[:12]], as_methods("flowcut:36")
    )
    assert answers(result, "mmlm_pocket_vqa") == [outcome.text for outcome in outcomes]
    scores = [task.score(one.id, one.text or "")["mmlm_acc"] for one in outcomes]
    found = result["results"]["mmlm_pocket_vqa"]["mmlm_acc,none"]
    assert found == task.aggregate("mmlm_acc", scores)


@pytest.mark.parametrize("column", [None, "name"])
def test_sampled_answers_are_the_same(
    model: EfficientChatModel, folder: Path, tmp_path: Path, column: str | None
) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    rows = [json.loads(line) for line in (own / "data.jsonl").read_text().splitlines()]
    named = [json.dumps(row | {"name": f"q{at * 7 % 12}"}) for at, row in enumerate(rows)]
    (own / "data.jsonl").write_text("\n".join(named) + "\n")
    sampled = {"max_new_tokens": 12, "do_sample": True, "temperature": 5.0}
    metadata = {"version": 2.0, **({} if column is None else {"id_column": column})}
    write_task(own, "mmlm_s", generation_kwargs=sampled, metadata=metadata)
    found = answers(evaluate(model, own, ["mmlm_s"]), "mmlm_s")
    [task] = find_tasks("mmlm_s", [own])
    assert isinstance(task, LocalTask)
    assert task.ids[1] == ("1" if column is None else "q7")
    samples = [task.sample(id) for id in task.ids]
    with load("pocket") as lmm:
        outcomes = Engine(lmm).answer(samples, as_methods("flowcut:36"))
    assert found == [outcome.text for outcome in outcomes]
    greedy = answers(evaluate(model, own, ["mmlm_t"]), "mmlm_t")
    assert found != greedy, "they are drawn"


def test_documents_of_one_name(asking: EfficientChatModel) -> None:
    asking.task_dict = {"t": {"test": [{"id": name} for name in "aba"]}}

    def messages(doc: dict[str, str]) -> list[dict[str, Any]]:
        return question(0)

    asked = [request(messages, SHORT, number, id_column="id") for number in range(3)]
    assert len(asking.generate_until([asked[0], asked[0], asked[1]])) == 3
    with pytest.raises(RunError, match=r"1 of 3 samples .*\(t 2\).*column 'id' has 'a' several"):
        asking.generate_until(asked)


def test_a_second_run_and_other_batches_give_the_same(
    model: EfficientChatModel, folder: Path
) -> None:
    first = evaluate(model, folder, ["mmlm_t"], limit=8)
    again = evaluate(model, folder, ["mmlm_t"], limit=8)
    single = EfficientChatModel(pretrained="pocket", batch_size=1, methods="flowcut:36")
    alone = evaluate(single, folder, ["mmlm_t"], limit=8)
    assert answers(first, "mmlm_t") == answers(again, "mmlm_t") == answers(alone, "mmlm_t")
    throughput = first["throughput"]
    assert throughput["avg_visual_tokens_in"] == 144
    assert throughput["avg_visual_tokens_kept"] == throughput["avg_visual_tokens_mean"] == 36
    for name in ("ttft_s", "prune_s", "prefill_s", "kv_bytes", "peak_memory_bytes"):
        assert throughput[f"avg_{name}"] > 0
    assert throughput["total_gen_tokens"] > 0
    [counts] = first["samples"]["mmlm_t"][0]["token_counts"]
    assert 36 < counts["input_tokens"] < 144
    assert counts["output_tokens"] > 0


def test_by_name_as_a_plug_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.models import MODEL_REGISTRY_V2

    for manifest in manifests():
        MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    args = "pretrained=pocket,method=flowcut,keep_tokens=18,config_sha=0123456789ab"
    result = evaluate(
        "mmlm_efficient", folder, ["mmlm_t"], model_args=args, batch_size="3", limit=3
    )
    assert result["throughput"]["avg_visual_tokens_kept"] == 18
    assert result["config"]["model_backend"] == "eval.lmms_model.EfficientChatModel (chat)"


def test_the_order_of_mixed_requests(asking: EfficientChatModel) -> None:
    mixed = [
        request(question, {**SHORT, "max_new_tokens": 1 + number % 3}, number, "tu"[number % 2])
        for number in range(7)
    ]
    alone = [texts(asking.generate_until([one]))[0] for one in mixed]
    assert texts(asking.generate_until(mixed)) == alone
    assert len(set(alone)) > 3
    assert asking.generate_until([]) == []


def test_a_document_asked_again(asking: EfficientChatModel) -> None:
    sampled = {"max_new_tokens": 12, "do_sample": True, "temperature": 5.0}
    first = texts(asking.generate_until([request(question, sampled, 0)] * 4))
    assert first == texts(asking.generate_until([request(question, sampled, 0)] * 4))
    assert len(set(first)) > 1


def test_answers_end_at_the_tasks_texts(asking: EfficientChatModel) -> None:
    words = functools.partial(question, words="list the objects.")
    [whole] = texts(asking.generate_until([request(words, SHORT, 0)]))
    assert "," in whole
    [cut] = texts(asking.generate_until([request(words, {**SHORT, "until": [","]}, 0)]))
    assert cut == whole.split(",")[0].strip()


def test_failed_samples_are_named_after_all_others_were_asked(
    asking: EfficientChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def messages(doc: int) -> list[dict[str, Any]]:
        if doc == 1:
            raise KeyError("no such column")
        return question(doc)

    asked: list[str] = []
    ask = Engine.answer

    def watched(engine: Engine, samples: Any, *rest: Any) -> Any:
        asked.extend(sample.id for sample in samples)
        outcomes = ask(engine, samples, *rest)
        return [
            one
            if one.id != "2"
            else type(one)("2", error={"where": "model", "type": "E", "message": "broken."})
            for one in outcomes
        ]

    monkeypatch.setattr(Engine, "answer", watched)
    with pytest.raises(
        RunError,
        match=r"the run failed, whatever exit code lmms-eval gives: 2 of "
        r"9 samples have no answer \(t 1, t 2\)\. The first one: KeyError \(media\): "
        r"'no such column'",
    ):
        asking.generate_until([request(messages, SHORT, number) for number in range(9)])
    assert asked == ["0", "2", "3", "4", "5", "6", "7", "8"]
    assert gen_metrics.get_logged_metrics_history() == []


def test_a_picture_that_cannot_be_read_fails_its_sample(asking: EfficientChatModel) -> None:
    def messages(doc: int) -> list[dict[str, Any]]:
        return messages_of({"type": "image", "url": "/nowhere.png"}, {"type": "text", "text": "?"})

    with pytest.raises(RunError, match=r"MediaError \(media\): .*/nowhere.png: no such file"):
        asking.generate_until([request(messages, SHORT, 0)])


def test_bad_settings_are_refused_before_anything_runs(asking: EfficientChatModel) -> None:
    def never(doc: int) -> Any:
        pytest.fail("a document was read")

    with pytest.raises(SettingsError, match="'beams' is unknown"):
        asking.generate_until([request(never, SHORT, 0), request(never, {"beams": 2}, 1)])


def test_rounds_follow_the_task(asking: EfficientChatModel) -> None:
    seen: list[Any] = []

    def messages(doc: int, **round: Any) -> Any:
        if not round:
            return question(doc)
        seen.append(
            (round["round_idx"], list(round["previous_output"]), round["previous_round_info"])
        )
        if round["round_idx"] == 3:
            return None, True, round["previous_output"], None
        return question(doc + 1), False, round["previous_output"], {"round": round["round_idx"]}

    def once(doc: int, **round: Any) -> Any:
        return None if round else question(doc)

    [rounds, other] = asking.generate_until_multi_round(
        [request(messages, SHORT, 0), request(once, SHORT, 1)]
    )
    first, second = texts(
        asking.generate_until([request(question, SHORT, 0), request(question, SHORT, 1)])
    )
    assert rounds == [first, second, second]
    assert other == [second]
    assert seen == [
        (1, [first], None),
        (2, [first, second], {"round": 1}),
        (3, [first, second, second], {"round": 2}),
    ]


def test_rounds_that_fail_or_never_end(
    asking: EfficientChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(doc: int, **round: Any) -> Any:
        return (None, False, [], None) if round else question(doc)

    with pytest.raises(RunError, match="expected a list of turns, got None"):
        asking.generate_until_multi_round([request(broken, SHORT, 0)])
    monkeypatch.setattr("eval.lmms_model._MOST_ROUNDS", 3)

    def endless(doc: int, **round: Any) -> Any:
        return (question(doc), False, [], None) if round else question(doc)

    with pytest.raises(RunError, match="has not ended after 3 rounds"):
        asking.generate_until_multi_round([request(endless, SHORT, 0)])


def test_likelihoods_are_refused(model: EfficientChatModel) -> None:
    with pytest.raises(UnsupportedError, match="output_type generate_until"):
        model.loglikelihood([])


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match=r"with 2 processes.*mmlm eval --workers N"):
        EfficientChatModel(pretrained="pocket")


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(SettingsError, match="'pretrain' is unknown. Did you mean 'pretrained'"):
        EfficientChatModel(pretrain="pocket")


def lmms_eval(folder: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = shutil.which("lmms-eval", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("the command lmms-eval is not installed")
    offline = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    return subprocess.run(
        [
            command,
            "--model",
            "mmlm_efficient",
            "--tasks",
            "mmlm_t",
            "--include_path",
            str(folder),
            "--device",
            "cpu",
            "--output_path",
            str(out),
            "--log_samples",
            *more,
        ],
        env={**os.environ, **offline, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_command_line_of_lmms_eval(folder: Path, tmp_path: Path) -> None:
    done = lmms_eval(
        folder,
        tmp_path,
        "--batch_size",
        "4",
        "--limit",
        "5",
        "--model_args",
        "pretrained=pocket,methods=[flowcut:36]",
    )
    files = sorted(path.name[16:] for path in tmp_path.rglob("*.json*"))
    assert files == ["results.json", "samples_mmlm_t.jsonl"], done.stdout + done.stderr
    [file] = tmp_path.rglob("*_results.json")
    results = json.loads(file.read_text())
    assert results["throughput"]["avg_visual_tokens_kept"] == 36
    [file] = tmp_path.rglob("*_samples_mmlm_t.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    model = EfficientChatModel(pretrained="pocket", methods="flowcut:36")
    own = answers(evaluate(model, folder, ["mmlm_t"], limit=5), "mmlm_t")
    assert [sample["filtered_resps"] for sample in samples] == own
    # lmms-eval writes numpy's numbers as texts.
    share = sum(float(one["right"]) for one in samples) / 5
    assert float(results["results"]["mmlm_t"]["right,none"]) == share


@pytest.mark.slow
def test_the_command_line_says_that_a_run_failed(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    Image.new("RGB", (4, 4)).save(broken / "1.png")
    (broken / "1.png").write_bytes((broken / "1.png").read_bytes()[:20])
    done = lmms_eval(broken, tmp_path / "out", "--model_args", "pretrained=pocket")
    assert (
        "the run failed, whatever exit code lmms-eval gives: 3 of 12" in done.stdout + done.stderr
    )
    assert not list((tmp_path / "out").rglob("*results.json"))
