"""A task about coloured pictures, written into a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

ROWS = [
    {"id": "a", "image": "red.png", "question": "Which colour?", "answer": "red", "kind": "hue"},
    {"id": "b", "image": "blue.png", "question": "And this?", "answer": "Blue.", "kind": "hue"},
]
COLOURS = {"red.png": (255, 0, 0), "blue.png": (0, 0, 255)}
DEFINITION: dict[str, Any] = {
    "task": "colours",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data.jsonl"}},
    "test_split": "test",
    "doc_to_visual": "image",
    "doc_to_text": "question",
    "doc_to_target": "answer",
    "metadata": {
        "version": 2,
        "id_column": "id",
        "group_column": "kind",
        "cluster_column": "image",
    },
}


def definition(folder: Path, text: str = "", **changes: Any) -> Path:
    """The YAML of a task: the usual one with some keys changed (None removes), then more text."""
    values = {key: value for key, value in (DEFINITION | changes).items() if value is not None}
    path = folder / "colours.yaml"
    path.write_text(yaml.safe_dump(values) + text, encoding="utf-8")
    return path


def jsonl(folder: Path, rows: list[Any] | None = None) -> Path:
    """The data: the usual rows, or others."""
    path = folder / "data.jsonl"
    lines = [json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def functions(folder: Path, source: str) -> None:
    """Write the module that a task's functions are in."""
    (folder / "utils.py").write_text(source, encoding="utf-8")


def colours(folder: Path) -> Path:
    """Two questions with a picture each."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 6), colour).save(folder / name)
    jsonl(folder)
    return folder


OWN_SCORES = """
import numpy as np
def results(doc, results):
    if results[0] == 'raise': raise KeyError('own')
    if results[0] == 'short': return {'right': 1}
    if results[0] == 'other': return {'wrong': 1}
    if results[0] == 'nan': return {'right': float('nan'), 'box': ()}
    return {'right': results[0] == doc['answer'], 'box': (np.float32(0.5), 2), 'extra': object()}
def widest(items): return max(item[1] for item in items)
"""
OWN = (
    "process_results: !function utils.results\n"
    "metric_list:\n"
    "- {metric: right, aggregation: mean, higher_is_better: true}\n"
    "- {metric: box, aggregation: !function utils.widest, higher_is_better: false}\n"
)
