"""The `mmlm train` and `mmlm bench` commands."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mmlm_efficient.cli_paths import check_folder
from mmlm_efficient.errors import MMLMError, SettingsError, nearest

train_app = typer.Typer(
    help="Train the models that this package ships.",
    epilog="Example: mmlm train pocket",
    no_args_is_help=True,
)
# How the command line takes `bench`. Not interspersed: what follows the name, --help too, is the
# benchmark's own.
BENCH: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "allow_interspersed_args": False},
    "epilog": "Example: mmlm bench flowcut --out outputs/flowcut_bench.json",
}

# Programs beside the benchmarks that measure nothing.
_NO_BENCHMARKS = ("readme_tables",)


@train_app.command("pocket", epilog="Example: mmlm train pocket --out runs/pocket --threads 2")
def train_pocket(
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints, logs and the finished weights.")
    ] = Path("runs/pocket"),
    seed: Annotated[int, typer.Option(help="Seed of weights and data, 0 to 2**32 - 1.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    scale: Annotated[float, typer.Option(help="Share of the steps; below 1 for a trial.")] = 1.0,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Then measure its accuracy and write its model card.")
    ] = False,
) -> None:
    """Train the embedded model again; a killed run goes on where it was."""
    if not 0 <= seed < 2**32:
        raise SettingsError(f"--seed {seed}: must be from 0 to 2**32 - 1.")
    where, out = f"--out {out}", Path(os.path.expanduser(out))
    check_folder(where, out)
    if evaluate:
        for name in ("pocket_accuracy", "pocket_card"):  # now, not after hours
            _check_benchmark(name, "--evaluate")

    from mmlm_efficient.pocket import train

    logging.getLogger("mmlm_efficient").setLevel(logging.INFO)
    try:
        folder = train.train_pocket(out, seed=seed, threads=threads, scale=scale)
    except MMLMError:
        raise
    except OSError as error:  # such as a disk that is full after an hour
        raise MMLMError(f"{where}: {error}. The same command goes on from there.") from error
    sys.stdout.write(f"{folder}\n")
    if evaluate:
        result, shared = str(out / "accuracy.json"), ["--model", str(folder)]
        arguments = [*shared, "--methods", "none", "--out", result, "--threads", str(threads)]
        code = _run_benchmark("pocket_accuracy", arguments)
        if code == 0:
            arguments = [*shared, "--pictures", result, "--out", str(out / "videos.json")]
            code = _run_benchmark("pocket_card", arguments)
        raise typer.Exit(code)


def bench(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(help="Benchmark; mmlm bench flowcut --help shows the options of flowcut."),
    ],
) -> None:
    """Run a benchmark of the checkout; what follows its name is passed on to it."""
    _check_benchmark(name, "bench")
    raise typer.Exit(_run_benchmark(name, context.args))


def _check_benchmark(name: str, where: str) -> None:
    """Refuse a benchmark that this installation does not have."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    known = sorted(
        file.stem
        for file in folder.glob("*.py")
        if file.stem not in _NO_BENCHMARKS and "def main(" in file.read_text(encoding="utf-8")
    )
    if not known:
        raise SettingsError(
            f"{where}: benchmarks are not part of the installed package. Clone the repository and "
            "run `make bench` there, or install it with pip install -e ."
        )
    if name not in known:
        close = nearest(name, known)
        hint = f" Did you mean {close!r}?" if close else ""
        raise SettingsError(f"{where}: {name!r} is unknown; there are {', '.join(known)}.{hint}")


def _run_benchmark(name: str, arguments: list[str]) -> int:
    """Exit status of a benchmark."""
    root = str(Path(__file__).resolve().parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)
    return int(importlib.import_module(f"benchmarks.{name}").main(arguments) or 0)
