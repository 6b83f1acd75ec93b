"""Tasks of lmms-eval with data of their own, written into a folder."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mmlm_efficient.pocket import questions, scene

# Not the user's cache; lmms-eval looks once in the life of a process.
_CACHE = tempfile.TemporaryDirectory()
os.environ["LMMS_EVAL_DATASETS_CACHE"] = _CACHE.name

UTILS = """
import numpy as np
from pathlib import Path
from PIL import Image

FOLDER = Path(__file__).parent


def doc_to_visual(doc):
    return [Image.open(FOLDER / doc["image"])]


def doc_to_messages(doc):
    image = {"type": "image", "url": str(FOLDER / doc["image"])}
    return [
        {"role": "user", "content": [image, {"type": "text", "text": "In <image>, "},
         {"type": "text", "text": doc["question"]}]}
    ]


def broken_messages(doc):
    raise KeyError("no such column")


def process_results(doc, results):
    right = results[0] == doc["answer"]
    return {"right": np.float32(right), "pair": (doc["answer"], results[0]), "extra": {1, 2}}


def bad_item(doc, results):
    return {"right": {1, 2}}


def bug(doc, results):
    raise ZeroDivisionError("a bug")


def share(items):
    return np.mean([a == b for a, b in items])


def with_args(items, args):
    (Path(args.output_path) / "submission.json").write_text("[]")
    return sum(items)


def fails(items):
    raise ValueError("nothing to see")


def no_number(items):
    return None
"""


class _Function(str):
    """Name of a function, written as !function."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Function, lambda dumper, value: dumper.represent_scalar("!function", f"utils.{value}")
)
F = _Function

BASE: dict[str, Any] = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_visual": F("doc_to_visual"),
    "doc_to_text": "question",
    "doc_to_target": "answer",
    "generation_kwargs": {"max_new_tokens": 16, "temperature": 0, "do_sample": False},
    "process_results": F("process_results"),
    "metric_list": [
        {"metric": "right", "aggregation": "mean", "higher_is_better": True},
        {"metric": "pair", "aggregation": F("share"), "higher_is_better": True},
    ],
    "metadata": {"version": 2.0},
}


def write_task(folder: Path, name: str, **changes: Any) -> None:
    """A YAML file, like `BASE` but for the changes; None takes a key away."""
    config = {"task": name, **BASE, **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / f"{name}.yaml").write_text(yaml.dump(config, Dumper=_Dumper))


def write_data(folder: Path, count: int = 12, **columns: Any) -> None:
    """Pictures, data.jsonl and utils.py."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "utils.py").write_text(UTILS)
    rows = []
    for number in range(count // 3):
        scene("heldout", number).image.save(folder / f"{number}.png")
        for one in questions(scene("heldout", number), np.random.default_rng(number))[:3]:
            row = {"image": f"{number}.png", "question": one.text, "answer": one.answer}
            rows.append({**row, **columns})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def only_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave lmms-eval's own 2,000 task files unread, which takes seconds."""
    from eval import lmms_task

    tasks = pytest.importorskip("lmms_eval.tasks")
    manager = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", manager)
    monkeypatch.setattr(lmms_task, "_indexed", lmms_task._indexed.__wrapped__)


def messages_of(*content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One turn of the user."""
    return [{"role": "user", "content": list(content)}]


def request(
    messages: Any, generation: Mapping[str, Any], number: int, task: str = "t", **metadata: Any
) -> Any:
    """A request as lmms-eval makes it for a chat model."""
    from lmms_eval.api.instance import Instance

    return Instance(
        request_type="generate_until",
        arguments=("", messages, dict(generation), number, task, "test"),
        idx=0,
        metadata={"task": task, "doc_id": number, "repeats": 1, **metadata},
    )


def texts(results: Sequence[Any]) -> list[str]:
    """The texts of an adapter's answers."""
    return [result.text for result in results]
