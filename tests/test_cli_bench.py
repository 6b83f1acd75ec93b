"""The command line: `mmlm train` and `mmlm bench`."""

from __future__ import annotations

import errno
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from mmlm_efficient import cli_bench
from tests.command import Result, Run, runner

Checkout = Callable[[str | None], None]


@pytest.fixture
def mmlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


def test_train_passes_its_options_on(
    mmlm: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = importlib.import_module("mmlm_efficient.pocket.train")
    seen: dict[str, object] = {}

    def fake(out: Path, **options: object) -> Path:
        seen.update(options)
        return out / "weights"

    monkeypatch.setattr(train, "train_pocket", fake)
    result = mmlm("train", "pocket", "--out", tmp_path, "--seed", 3, "--threads", 1)
    assert result.out == f"{tmp_path / 'weights'}\n"
    assert seen == {"seed": 3, "threads": 1, "scale": 1.0}


@pytest.mark.parametrize("seed", ["9" * 23, 2**32, -1])
def test_train_refuses_a_seed(
    mmlm: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: object
) -> None:
    monkeypatch.setattr("mmlm_efficient.pocket.train.train_pocket", None)  # never hours of work
    result = mmlm("train", "pocket", "--out", tmp_path / "run", "--seed", seed)
    assert result == Result(2, "", f"mmlm: --seed {seed}: must be from 0 to 2**32 - 1.\n")


def test_train_says_where_the_disk_was_full(
    mmlm: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = importlib.import_module("mmlm_efficient.pocket.train")

    def full_disk(out: Path, **_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(out / "words.pt"))

    monkeypatch.setattr(train, "train_pocket", full_disk)
    result = mmlm("train", "pocket", "--out", tmp_path)
    assert result.code == 1
    assert f"--out {tmp_path}: [Errno 28] No space left on device: " in result.err
    assert result.err.count("\n") == 1


def loaded_benchmarks() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "benchmarks"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkout]:
    """Pretend that the package lies in a folder with or without benchmarks."""

    def pretend(source: str | None) -> None:
        if source is not None:
            folder = tmp_path / "benchmarks"
            folder.mkdir()
            (folder / "__init__.py").touch()
            (folder / "toy.py").write_text(source)
        monkeypatch.setattr(cli_bench, "__file__", str(tmp_path / "mmlm_efficient" / "cli.py"))
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        for name in loaded_benchmarks():
            monkeypatch.delitem(sys.modules, name)

    yield pretend
    for name in loaded_benchmarks():  # the pretended ones; monkeypatch puts the real ones back
        del sys.modules[name]


def test_bench_runs_and_passes_arguments_on(mmlm: Run, checkout: Checkout, tmp_path: Path) -> None:
    source = "def main(argv):\n    print(argv)\n    return 0 if argv else 1\n"
    checkout(source)
    assert mmlm("bench", "toy", "--rounds", 3) == Result(0, "['--rounds', '3']\n", "")
    assert mmlm("bench", "toy").code == 1
    result = mmlm("bench", "toi")
    assert result.code == 2
    assert "Did you mean 'toy'" in result.err
    (tmp_path / "benchmarks" / "readme_tables.py").write_text(source)
    assert "there are toy." in mmlm("bench", "readme_tables").err


def test_train_evaluates(
    mmlm: Run, checkout: Checkout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = importlib.import_module("mmlm_efficient.pocket.train")
    monkeypatch.setattr(train, "train_pocket", lambda out, **_: out / "weights")
    checkout("def main(argv):\n    print(' '.join(argv))\n")
    refused = mmlm("train", "pocket", "--out", tmp_path, "--evaluate")
    assert refused.code == 2
    assert "--evaluate: 'pocket_accuracy' is unknown" in refused.err
    folder = tmp_path / "benchmarks"
    (folder / "pocket_accuracy.py").write_text((folder / "toy.py").read_text())
    (folder / "toy.py").rename(folder / "pocket_card.py")
    result = mmlm("train", "pocket", "--out", tmp_path, "--evaluate")
    assert result.code == 0
    model = f"--model {tmp_path / 'weights'}"
    assert f"{model} --methods none --out {tmp_path / 'accuracy.json'}" in result.out
    assert f"{model} --pictures {tmp_path / 'accuracy.json'}" in result.out


def _with_two(main: Callable[[list[str]], int], size: str, argv: list[str]) -> int:
    return main([*argv, size, "2"])


def test_train_evaluates_with_the_real_benchmark(
    mmlm: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The shipped weights stand in for trained ones; two scenes, all else as the command asks."""
    train = importlib.import_module("mmlm_efficient.pocket.train")
    folder = tmp_path / "weights"
    shutil.copytree(train.WEIGHTS, folder)
    (folder / "README.md").unlink()
    monkeypatch.setattr(train, "train_pocket", lambda out, **_: folder)
    for name, size in (("pocket_accuracy", "--scenes"), ("pocket_card", "--videos")):
        benchmark = importlib.import_module(f"benchmarks.{name}")
        shorter = partial(_with_two, benchmark.main, size)
        monkeypatch.setattr(benchmark, "main", shorter)
    result = mmlm("train", "pocket", "--out", tmp_path, "--threads", 1, "--evaluate")
    assert result.code == 0
    assert f"{folder} on 2 held-out scenes" in result.out
    written = sorted(file.name for file in tmp_path.iterdir())
    assert written == ["accuracy.json", "accuracy.png", "videos.json", "weights"]
    assert "| all pictures |" in (folder / "README.md").read_text()
    measured = json.loads((tmp_path / "accuracy.json").read_text())
    assert (measured["scenes"], measured["threads"]) == (2, 1)
    (row,) = measured["rows"]
    assert (row["method"], row["keep_tokens"]) == ("none", 144)
    assert row["overall"]["count"] == measured["questions"] > 4
    assert row["overall"]["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flowcut", ("--out", "--quick", "--parts", "--full-size", "--repeats")),
        ("pocket_accuracy", ("--out", "--scenes", "--methods", "--position-ids")),
        ("pocket_card", ("--out", "--videos", "--pictures")),
    ],
)
def test_bench_help_is_the_benchmarks_own(mmlm: Run, name: str, options: tuple[str, ...]) -> None:
    result = mmlm("bench", name, "--help")
    assert result.code == 0
    assert f"usage: mmlm bench {name}" in result.out
    for option in options:
        assert option in result.out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("flowcut", "--rounds", 3), "mmlm bench flowcut: error: unrecognized arguments: --rounds"),
        (("flowcut", "--repeat", 3), "unrecognized arguments: --repeat"),  # nor abbreviations
        (("pocket_accuracy", "--scene", 3), "unrecognized arguments: --scene"),
        (("pocket_card", "--video", 3), "unrecognized arguments: --video"),
        (("flowcut", "--repeats", 0), "argument --repeats: must be at least 1, got 0"),
        (("flowcat", "--help"), "Did you mean 'flowcut'"),
        (("--rounds", 3, "flowcut"), "No such option: --rounds"),
        ((), "Missing argument"),
    ],
)
def test_bench_refuses_unknown_options(mmlm: Run, arguments: tuple[object, ...], part: str) -> None:
    result = mmlm("bench", *arguments)
    assert result.code == 2
    assert part in result.err
    assert "Traceback" not in result.err
    assert result.out == ""


def test_bench_outside_a_checkout(mmlm: Run, checkout: Checkout) -> None:
    checkout(None)
    result = mmlm("bench", "flowcut")
    assert result.code == 2
    assert "Clone the repository" in result.err
