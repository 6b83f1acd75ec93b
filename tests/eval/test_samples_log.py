"""The samples file: nothing lost, nothing twice, nothing mixed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.samples_log import SamplesLog, read_records
from mmlm_efficient.errors import DataError, RunError, SettingsError

HEADER: dict[str, Any] = {
    "task": "t",
    "config_sha": "c" * 12,
    "data_sha": "d" * 12,
    "rows": {"none": []},
}


def record(id: str, row: str = "none", ok: bool = True, answer: str = "yes") -> dict[str, Any]:
    return {"kind": "sample", "row": row, "id": id, "ok": ok, "answer": answer}


def test_goes_on_behind_what_was_finished(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "t.samples.jsonl"
    with SamplesLog(path, HEADER, resume=False) as log:
        log.append([record("1"), record("2", ok=False)])
    with SamplesLog(path, HEADER, resume=True) as log:
        assert log.finished("none", "1")
        assert not log.finished("none", "2"), "a failed sample is asked again"
        assert not log.finished("none", "3")
        log.append([record("2", answer="now"), record("3")])
    header, records = read_records(path)
    assert header["task"] == "t"
    assert [(one["id"], one["ok"], one["answer"]) for one in records] == [
        ("1", True, "yes"),
        ("2", True, "now"),
        ("3", True, "yes"),
    ]


@pytest.mark.parametrize("torn", range(1, 60, 7))
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: int) -> None:
    path = tmp_path / "t.jsonl"
    with SamplesLog(path, HEADER, resume=False) as log:
        log.append([record("1"), record("ä" * 20)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-torn])
    assert [one["id"] for one in read_records(path)[1]] == ["1"]
    with SamplesLog(path, HEADER, resume=True) as log:
        assert [one["id"] for one in log.records] == ["1"]
        log.append([record("2")])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line).get("id") for line in lines] == [None, "1", None, "2"]


def test_a_damaged_line_before_the_last_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with SamplesLog(path, HEADER, resume=False) as log:
        log.append([record("1"), record("2")])
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:20] + "\n" + lines[2], encoding="utf-8")
    with pytest.raises(DataError, match="line 2: is damaged"):
        read_records(path)
    with pytest.raises(DataError, match="line 2"):
        SamplesLog(path, HEADER, resume=True)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"kind": "sample", "row": "none", "id": "1", "ok": true}\n')
    with pytest.raises(DataError, match="format 1"):
        SamplesLog(path, HEADER, resume=True)
    path.write_text("")
    with pytest.raises(DataError, match="no header"):
        read_records(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path / "missing")


def test_is_refused_without_resume(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    SamplesLog(path, HEADER, resume=False).close()
    with pytest.raises(SettingsError, match="--resume"):
        SamplesLog(path, HEADER, resume=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config_sha": "e" * 12}, "another model or other settings"),
        ({"data_sha": "e" * 12}, "other data"),
        ({"task": "u"}, "another task"),
        ({"rows": {"none": [{"name": "flowcut"}]}}, "row 'none' had other settings"),
    ],
)
def test_answers_of_something_else_are_not_mixed_in(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "t.jsonl"
    with SamplesLog(path, HEADER, resume=False) as log:
        log.append([record("1")])
    before = path.read_bytes()
    with pytest.raises(SettingsError, match=message):
        SamplesLog(path, {**HEADER, **change}, resume=True)
    assert path.read_bytes() == before


def test_further_rows_are_welcome(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    more = {"random:36": [{"name": "random", "seeds": (1, 2)}]}
    SamplesLog(path, HEADER, resume=False).close()
    for _ in range(2):  # the second time the file holds what JSON makes of a tuple
        with SamplesLog(path, {**HEADER, "rows": {**HEADER["rows"], **more}}, resume=True) as log:
            log.append([record("1", "random:36")])
    header, _ = read_records(path)
    assert list(header["rows"]) == ["none", "random:36"]


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.samples_log._LOCK_WAIT_S", 0.3)
    path = tmp_path / "t.jsonl"
    code = (
        "import sys, time; from eval.samples_log import SamplesLog; from pathlib import Path\n"
        f"log = SamplesLog(Path(sys.argv[1]), {HEADER!r}, resume=False)\n"
        "print('open', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(RunError, match="another process writes it"):
            SamplesLog(path, HEADER, resume=True)
    finally:
        holder.kill()
        holder.wait()
    SamplesLog(path, HEADER, resume=True).close()


def test_what_changed_between_runs_is_told(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for workers in (0, 0, 2):
        with SamplesLog(path, {**HEADER, "workers": workers, "threads": 1}, resume=True) as log:
            mixed = log.header["mixed"]
    assert mixed == read_records(path)[0]["mixed"] == ["workers"]


@pytest.mark.parametrize("missing", ["format", "task", "config_sha", "data_sha", "rows"])
def test_a_header_that_lacks_something(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "t.jsonl"
    header = {"kind": "header", "format": 1, **HEADER}
    del header[missing]
    path.write_text(json.dumps(header) + "\n")
    with pytest.raises(DataError, match="line 1"):
        read_records(path)


def test_lines_of_another_kind_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    SamplesLog(path, HEADER, resume=False).close()
    whole = path.read_text()
    for line in ('{"kind": "sampel", "row": "a", "id": "b", "ok": true}', '{"kind": "sample"}'):
        path.write_text(f"{whole}{line}\n")
        with pytest.raises(DataError, match="line 2: is damaged"):
            read_records(path)


def test_text_without_utf8_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with SamplesLog(path, HEADER, resume=False) as log:
        log.append([record("1", answer="\ud83d"), record("2", answer="ä")])
    assert [one["answer"] for one in read_records(path)[1]] == ["\ud83d", "ä"]


def test_a_full_disk_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.jsonl"
    real = os.write
    log = SamplesLog(path, HEADER, resume=False)
    log.append([record("1")])

    def half_then_full(file: int, data: Any) -> int:
        if len(data) > 40:
            return real(file, data[:40])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(RunError, match=r"No space left on device.*--resume"):
        log.append([record("2")])
    assert not log.finished("none", "2")
    log.close()
    monkeypatch.undo()
    with SamplesLog(path, HEADER, resume=True) as log:
        assert [one["id"] for one in log.records] == ["1"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        SamplesLog(tmp_path / "file" / "t.jsonl", HEADER, resume=False)
