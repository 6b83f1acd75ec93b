"""What all benchmarks need: fair timing, peak memory of tensors, arguments."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from mmlm_efficient.errors import MMLMError

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"


# -- time ------------------------------------------------------------------------------------


def interleaved(
    cases: Mapping[str, Callable[[], Mapping[str, float]]],
    repeats: int,
    *,
    warmup: int = 1,
    label: str = "",
) -> dict[str, list[dict[str, float]]]:
    """Measure cases in turns (A B A B ...), so that a slow spell of the machine hits them alike.

    Args:
        cases: by name; each call does its work once and returns seconds by phase.
        repeats: rounds that count.
        warmup: rounds before them that do not.
        label: of the progress bar.

    Returns:
        For each case its measurements, in order of the rounds.
    """
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    total = (warmup + repeats) * len(cases)
    with tqdm(total=total, desc=label, leave=False, disable=None) as bar:
        for round_ in range(warmup + repeats):
            for name, case in cases.items():
                gc.collect()
                seconds = dict(case())
                if round_ >= warmup:
                    measured[name].append(seconds)
                bar.update()
    return measured


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Result and seconds of a call, the device's queue finished before and after."""
    _finish(device)
    start = time.perf_counter()
    result = call()
    _finish(device)
    return result, time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all single values of repeated measurements, seconds."""
    rounded = [round(value, 6) for value in seconds]
    return {
        "median_s": round(statistics.median(seconds), 6),
        "min_s": min(rounded),
        "max_s": max(rounded),
        "runs_s": rounded,
    }


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """seconds / reference: of the medians, and the extremes among the rounds.

    Args:
        seconds, reference: measurements of the same rounds, in order.
    """
    rounds = [one / other for one, other in zip(seconds, reference, strict=True)]
    return {
        "of_medians": round(statistics.median(seconds) / statistics.median(reference), 4),
        "lowest_round": round(min(rounds), 4),
        "highest_round": round(max(rounds), 4),
    }


# -- memory ----------------------------------------------------------------------------------


def peak_tensor_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most memory that tensors took at one moment of a call, beyond what was there before.

    Counted at torch's own allocator, so it is exact and the same in every run. What libraries
    allocate past torch (work space of matrix products) is not in it; see `peak_resident_bytes`.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    totals = [
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    ]
    if not totals:
        return 0
    _, first_total, first_bytes = min(totals)
    return int(max(total for _, total, _ in totals) - (first_total - first_bytes))


def in_fresh_process(call: Callable[..., T], *args: Any) -> T:
    """Run a function of a module in a new process; arguments and result must pickle."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(call, *args).result()


# -- arguments and files ---------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Where a benchmark runs, as its last options."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: as torch chooses")


def measured(
    measure: Callable[[argparse.Namespace], dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any] | None:
    """A benchmark's result with the chosen CPU threads; None, and the reason told, if it fails."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        return measure(options)
    except MMLMError as error:
        print(f"mmlm: {error}", file=sys.stderr)
        return None


def json_file(text: str) -> Path:
    """The path of a result file, for argparse: refused now rather than after the work."""
    path = Path(os.path.expanduser(text))
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"must end in '.json', got {text}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: give the path of a file")
    return path


def read_json(path: Path) -> Any:
    """Read a result file."""
    return json.loads(path.read_text(encoding="utf-8"))
