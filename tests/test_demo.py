"""The table that `mmlm demo` prints, and the Python that `make demo` takes."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mmlm_efficient import load
from mmlm_efficient.demo import run_demo, show_demo

ROOT = Path(__file__).resolve().parents[1]


def test_table() -> None:
    result = run_demo(load("pocket"), 56, list)
    assert [row.kept for row in result.rows] == [144, 72, 36, 18, 72, 36, 18]
    console = Console(file=io.StringIO(), width=200)
    show_demo(result, ["kept.png"], console)
    printed = console.file.getvalue()
    for one in result.questions:
        assert f"{one.text}  ->  {one.answer}" in printed
    assert printed.count("│ x ") == sum(not right for row in result.rows for right in row.right)
    assert "unpruned" in printed
    assert printed.endswith("Drew kept.png\n")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile, and a Python that is too old."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.9.2; else exit 1; fi\n')
    old.chmod(0o755)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # What a `make` around these tests hands down is not for this one.
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_make_refuses_an_old_python(checkout: Path) -> None:
    ended = make(checkout, "demo", "PYTHON=./old")
    assert ended.returncode != 0
    assert ended.stderr.startswith(
        "Python 3.11 or newer is needed; './old' says: Python 3.9.2. "
        "Give another: make demo PYTHON=python3.12\n"
    )
    missing = make(checkout, "test-fast", "PYTHON=python9").stderr
    assert "Python 3.11 or newer is needed; 'python9' says: " in missing
    assert "make test-fast PYTHON=python3.12" in missing
    assert not (checkout / ".venv").exists()


def test_make_refuses_an_old_environment(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(checkout / "old", checkout / ".venv" / "bin" / "python")
    ended = make(checkout, "demo", f"PYTHON={sys.executable}")
    assert ended.returncode != 0
    assert ".venv says: Python 3.9.2. Run: make clean; make demo PYTHON=" in ended.stderr


def test_make_takes_a_new_python(checkout: Path) -> None:
    # Nothing is installed: the stand-in for pip ends it.
    (checkout / ".venv" / "bin").mkdir(parents=True)
    python = checkout / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" != -m ] || exit 7\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    ended = make(checkout, "demo", "PYTHON=./old")  # not looked at: there is an environment
    assert "newer is needed" not in ended.stderr
    assert "Error 7" in ended.stderr
