"""Progress where standard error is no terminal: lines, not too many, that say how things stand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from eval.progress import TaskBar

TASK: Any = SimpleNamespace(name="small", metrics=[SimpleNamespace(name="accuracy")])


def record(row: str, score: float | None, ok: bool = True) -> Any:
    return {"ok": ok, "row": row, "scores": {"accuracy": score}}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr("eval.progress.time.monotonic", lambda: now.s)
    return now


def test_a_line_every_half_minute(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with TaskBar(TASK, 10, [record("none", 1.0), record("none", None, ok=False)]) as bar:
        clock.s += 29
        bar.add([record("none", 0.0)])
        assert capsys.readouterr().err == ""
        clock.s += 1
        bar.add([record("random:8", 1.0), record("none", None, ok=False)])
        # 3 answers in 30 s, 6 to go.
        assert capsys.readouterr().err == (
            "small: 4 of 10 answers, 01:00 left; none 50.0 %, random:8 100.0 %, 1 failed\n"
        )
        clock.s += 29
        bar.add([record("none", 1.0)])
        assert capsys.readouterr().err == ""
    # The last line says how it ended: 4 in 59 s, 5 to go.
    assert capsys.readouterr().err.startswith("small: 5 of 10 answers, 01:13 left; none 66.7 %")


def test_scores_that_are_no_shares_are_numbers() -> None:
    bar = TaskBar(TASK, 10, [])
    bar.add([record("none", 12.5), record("none", 7.5)])
    assert bar.standing() == "none 10"
