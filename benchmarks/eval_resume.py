"""A long evaluation killed again and again: no sample twice, none lost, the same scores.

    python -m benchmarks.eval_resume --samples 2000 --kills 10 --out docs/results/eval_resume.json

One run of `mmlm eval` is left alone; a second is killed with SIGKILL at random moments (every
other time only the runner, whose task process then has to end by itself) and goes on with
`--resume`. Then both runs' files are compared line by line.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import json_file, positive
from mmlm_efficient.files import write_json
from mmlm_efficient.machine import machine_line, provenance

TASK = "mmlm_pocket_vqa"
METHODS = "flowcut:36"
_START_LIMIT_S = 120.0  # Python and torch are imported, the model is loaded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0, or 1 when a sample is twice, lost, or answered otherwise.
    """
    options = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(json.dumps({key: result[key] for key in ("kills", "checks")}, indent=2))
    print(machine_line(result))
    if options.out is not None:
        write_json(options.out, result)
        print(f"written: {options.out}")
    return 0 if all(result["checks"].values()) else 1


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The undisturbed run, the killed one, and how they compare."""
    quiet, killed = folder / "quiet", folder / "killed"
    start = time.perf_counter()
    code = _start(quiet, options, resume=False).wait()
    seconds = time.perf_counter() - start
    if code != 0:
        raise SystemExit(f"the undisturbed run ended with exit code {code}:\n{_log(quiet)}")
    kills = _kill_and_resume(killed, options, seconds)
    one, other = _records(quiet), _records(killed)
    lines = collections.Counter(
        (line["row"], line["id"]) for line in _lines(killed) if line["kind"] == "sample"
    )
    return {
        "benchmark": "eval_resume",
        **provenance(torch.device("cpu")),
        "task": TASK,
        "rows": ["none", METHODS],
        "samples": options.samples,
        "answers": len(one),
        "undisturbed_s": round(seconds, 1),
        "kills": kills,
        "checks": {
            "killed_as_often_as_asked": len(kills) == options.kills,
            "all_kills_between_answers": all(
                0 < kill["answers_after"] < len(one) for kill in kills
            ),
            "all_samples_answered": len(one) == 2 * options.samples,
            "no_sample_twice": set(lines.values()) == {1},
            "none_lost": one.keys() == other.keys(),
            "same_answers": {key: line["answer"] for key, line in one.items()}
            == {key: line["answer"] for key, line in other.items()},
            "same_scores": _scores(quiet) == _scores(killed),
            "no_process_left": all(kill["others_gone_s"] is not None for kill in kills),
        },
        "scores": _scores(killed),
    }


def _kill_and_resume(
    out: Path, options: argparse.Namespace, seconds: float
) -> list[dict[str, Any]]:
    """Kill the run so often while it answers, then let it finish.

    Args:
        out: folder of the run.
        options: of the benchmark.
        seconds: that the undisturbed run took, its start included.
    """
    rng = random.Random(options.seed)
    kills: list[dict[str, Any]] = []
    for number in tqdm(range(options.kills), desc="kills", unit="kill", disable=None):
        before = len(_records(out))
        process = _start(out, options, resume=(out / "run.json").exists())
        if not _grows(out, before, process):
            break  # it finished before its kill: the checks will say so
        # Moments spread over what is left, so that all kills find a run that is not over.
        after_s = rng.uniform(0, 1.5 * seconds / (options.kills + 2))
        time.sleep(after_s)
        if process.poll() is not None:
            break
        whole_group = number % 2 == 0
        children = _children(process.pid)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        gone_s = _gone_s(children)
        kills.append(
            {
                "after_first_answer_s": round(after_s, 2),
                "killed": "all processes" if whole_group else "the runner",
                "others_gone_s": gone_s,
                "answers_before": before,
                "answers_after": len(_records(out)),
            }
        )
    code = _start(out, options, resume=(out / "run.json").exists()).wait()
    if code != 0:
        raise SystemExit(f"the resumed run ended with exit code {code}:\n{_log(out)}")
    return kills


def _grows(out: Path, before: int, process: subprocess.Popen[bytes]) -> bool:
    """Wait until a run that goes on has a new answer; False if it ends first."""
    end = time.perf_counter() + _START_LIMIT_S
    while len(_records(out)) <= before:
        if process.poll() is not None or time.perf_counter() > end:
            return False
        time.sleep(0.05)
    return True


def _start(out: Path, options: argparse.Namespace, *, resume: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mmlm_efficient", "eval", "--tasks", TASK]
    command += ["--methods", METHODS, "--limit", str(options.samples), "--out", str(out)]
    command += ["--batch-size", "16", "--threads", str(options.threads)]
    log = (out.parent / f"{out.name}.log").open("ab")
    return subprocess.Popen(
        [*command, *(["--resume"] if resume else [])],
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def _log(out: Path) -> str:
    """The end of what a run said."""
    return (out.parent / f"{out.name}.log").read_text(encoding="utf-8", errors="replace")[-2000:]


def _children(pid: int) -> list[int]:
    """Process ids of a process's descendants."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            child = int(entry.name)
            found += [child, *_children(child)]
    return found


def _gone_s(pids: Sequence[int], limit_s: float = 15.0) -> float | None:
    """Seconds until none of the processes is left; None if they outlive the limit."""
    start = time.perf_counter()
    while time.perf_counter() - start < limit_s:
        if not any(_alive(pid) for pid in pids):
            return round(time.perf_counter() - start, 2)
        time.sleep(0.05)
    return None


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _lines(out: Path) -> list[dict[str, Any]]:
    """All whole lines of the samples file; none before there is one."""
    path = out / "pocket" / f"{TASK}.samples.jsonl"
    text = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def _records(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (line["row"], line["id"]): line
        for line in _lines(out)
        if line["kind"] == "sample" and line["ok"]
    }


def _scores(out: Path) -> dict[str, Any]:
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {
        row["row"]: [row["metrics"], row["to_vanilla"], row["groups"]]
        for task in report["tasks"]
        for row in task["rows"]
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmlm bench eval_resume",
        description="Kill an evaluation at random moments and compare it with an undisturbed one.",
        epilog="example: mmlm bench eval_resume --out docs/results/eval_resume.json",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=json_file, help="JSON file to write")
    parser.add_argument("--samples", type=positive, default=2000, help="default 2000")
    parser.add_argument("--kills", type=positive, default=10, help="default 10")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads; default 2")
    return parser


if __name__ == "__main__":
    sys.exit(main())
