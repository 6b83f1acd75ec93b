"""Reports made by hand, as the runner hands them to `write_report`, and samples files for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ATTACK = '<script src="https://evil.example/x.js">alert("1")</script><img src=x onerror=y> a|b'


def row(label: str, value: float | None, base: float | None = None, **changes: Any) -> dict:
    """A row with all figures; `base` is the stock model's score."""
    stock = label == "none"
    difference = None if value is None or base is None else round(value - base, 6)
    interval = None if difference is None else [difference - 0.01, difference + 0.01]
    ends = None if value is None else [value - 0.02, value + 0.02]
    found = {
        "row": label,
        "methods": [],
        "samples": 1000,
        "failed": 0,
        "metrics": {"acc": {"value": value, "interval": ends, "interval_kind": "wilson"}},
        "to_vanilla": None
        if stock
        else {"difference": difference, "interval": interval, "pairs": 1000},
        "groups": {"where": {"count": 500, "value": value, "interval": ends}},
        "visual_tokens_in": 144.0,
        "visual_tokens_kept": 144.0 if stock else 36.0,
        "visual_tokens_mean": 144.0 if stock else 36.0,
        "ttft_s": {"median": 0.04 if stock else 0.02, "mean": 0.04, "p95": 0.05},
        "decode_tokens_per_s": 210.0,
        "peak_memory_bytes": 412 * 2**20,
        "kv_bytes": 2**20 if stock else 2**18,
        "prune_s": None if stock else 0.0021,
        "prefill_s": 0.01,
        "tower_s": 0.01,
        "batch_size": 1,
    }
    return {**found, **changes}


NOTHING = {
    "samples": 0,
    "metrics": {"acc": {"value": None, "interval": None, "interval_kind": None}},
    "to_vanilla": {"difference": None, "interval": None, "pairs": 0},
    "groups": {},
    "visual_tokens_in": None,
    "visual_tokens_kept": None,
    "visual_tokens_mean": None,
    "ttft_s": {"median": None, "mean": None, "p95": None},
    "decode_tokens_per_s": None,
    "peak_memory_bytes": None,
    "kv_bytes": None,
    "prune_s": None,
    "batch_size": None,
}


def task(name: str, rows: Sequence[dict], **changes: Any) -> dict:
    found = {
        "run": "pocket",
        "task": name,
        "task_version": "1",
        "source": "bundled",
        "config_sha": "0123456789ab",
        "data_sha": "ba9876543210",
        "seed": 0,
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "hardware": {"cpu": "a processor", "device": "cpu"},
        "threads": 1,
        "date": "2026-11-25 03:00 UTC",
        "metric": "acc",
        "higher_is_better": True,
        "samples": 1000,
        "rows": list(rows),
        "failures": [],
    }
    return {**found, **changes}


def report(tasks: Sequence[dict], **changes: Any) -> dict:
    found = {
        "format": 1,
        "date": "2026-11-25 03:10 UTC",
        "config": {"runs": [{"name": "pocket", "model": "hub/pocket"}], "note": "ü | <b>"},
        "config_sha": "0123456789ab",
        "runs": list(dict.fromkeys(one["run"] for one in tasks)) or ["pocket"],
        "tasks": list(tasks),
        "errors": [],
        "seconds": 431.2,
    }
    return {**found, **changes}


def usual() -> dict:
    """Two tasks, four rows, the second one lossy."""
    rows = [row("none", 0.831)]
    for label, value in (("flowcut:36", 0.794), ("flowcut:72", 0.829), ("fastv:36", 0.70)):
        rows.append(row(label, value, 0.831))
    rows[2]["visual_tokens_kept"] = rows[2]["visual_tokens_mean"] = 72.0
    return report(
        [task("vqa", rows), task("video", [row("none", 0.5), row("flowcut:36", 0.4, 0.5)])]
    )


def write_samples(
    folder: Path, result: Mapping[str, Any], scores: Mapping[str, Mapping[str, Any]]
) -> Path:
    """A samples file: scores by row and id; None is a failed sample."""
    lines: list[dict] = [
        {
            "kind": "header",
            "format": 1,
            "task": result["task"],
            "config_sha": result["config_sha"],
            "data_sha": result["data_sha"],
            "rows": {label: {} for label in scores},
            "metrics": [{"name": "acc", "higher_is_better": True, "aggregation": "mean"}],
        }
    ]
    for label, by_id in scores.items():
        for name, score in by_id.items():
            record = {"kind": "sample", "row": label, "id": name, "cluster": None, "group": None}
            if score is None:
                error = {"where": "model", "type": "RuntimeError", "message": "no"}
                lines.append({**record, "ok": False, "target": None, "error": error})
                continue
            answer = f"says {score:g}"
            record |= {"ok": True, "target": ["cat", "a cat"], "answer": answer, "usage": {}}
            lines.append({**record, "scores": {"acc": score}})
    path = folder / result["run"] / f"{result['task']}.samples.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
