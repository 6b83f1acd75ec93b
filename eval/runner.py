"""The evaluation runner: methods x budgets x tasks, in one command that tells the truth.

Everything is checked before a model is loaded. Each task group then runs in a process of its own
(`worker`), which writes every answer as it comes; the runner collects the results of the tasks,
writes the report, and says by its exit code what happened.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.find_tasks import find_tasks
from eval.overlays import OVERLAYS
from eval.plan import EvalConfig, Job, check_task_keys
from eval.report import write_report
from eval.samples_log import check_same, header_of
from eval.task import Task
from eval.worker import (
    Group,
    Trouble,
    identity,
    run_in_process,
    samples_path,
    selected,
)
from mmlm_efficient.errors import DataError, MMLMError, ModelLoadError, RunError, SettingsError
from mmlm_efficient.files import write_json
from mmlm_efficient.machine import hardware, now_text, versions
from mmlm_efficient.settings import refuse_unknown

GOOD, FAILED, WRONG_USAGE, FAILED_SAMPLES = 0, 1, 2, 3
REPORT_FORMAT = 1


@dataclass(frozen=True)
class Options:
    """How a configuration is run; none of it changes an answer beyond the last bits of numbers.

    Attributes:
        out: folder of the run.
        resume: go on with what is there.
        only: ids of the samples to ask; empty means all.
        workers: Ray workers; 0 asks in the group's process.
        ray_address: of a running Ray cluster; None starts Ray on this machine.
        threads: CPU threads of each process with a model.
        overlays: samples of each task whose kept tokens are drawn.
    """

    out: Path
    resume: bool = False
    only: tuple[str, ...] = ()
    workers: int = 0
    ray_address: str | None = None
    threads: int | None = None
    overlays: int = OVERLAYS


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        report: what report.json holds.
        files: the report's files.
        troubles: tasks or groups without a result, with the reason.
    """

    report: dict[str, Any]
    files: tuple[Path, ...]
    troubles: tuple[Trouble, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 all good; 1 something has no result; 2 because of wrong usage; 3 all have results,
        but samples failed."""
        rows = [(task, row) for task in self.report["tasks"] for row in task["rows"]]
        if self.troubles:
            usage = all(isinstance(one.error, SettingsError) for one in self.troubles)
            return WRONG_USAGE if usage and not rows else FAILED
        if any(row["metrics"][task["metric"]]["value"] is None for task, row in rows):
            return FAILED
        return FAILED_SAMPLES if any(row["failed"] for _, row in rows) else GOOD


def run_eval(config: EvalConfig, options: Options) -> RunResult:
    """Run a configuration and write its report.

    Args:
        config: what to run.
        options: how.

    Raises:
        SettingsError: an unknown task or sample id, or a folder that holds another run.
        DataError: a task whose data cannot be used.
        ModelLoadError: the only model, or the device, is not there. All of these are raised
            before anything is loaded or written.
        RunError: the run's folder cannot be written.
    """
    start = time.perf_counter()
    jobs = config.jobs()
    with contextlib.redirect_stdout(sys.stderr):  # tasks are programs and may print
        tasks = check_tasks(jobs)
    _check_only(options.only, [task for found in tasks.values() for task in found])
    groups, troubles = _planned(jobs, options)
    with _folder(options, config, groups, tasks):
        results: list[dict[str, Any]] = []
        for group in groups:
            names = [task.name for entry in group.entries for task in tasks[group.job.run, entry]]
            for result in _outcomes(group, names):
                if isinstance(result, Trouble):
                    troubles.append(result)
                else:
                    results.append(result)
        report = _report(config, options, jobs, results, troubles)
        report["seconds"] = round(time.perf_counter() - start, 1)
        files: list[Path] = []
        # A run that came to nothing leaves the report of an earlier one alone.
        if results or not (options.out / "report.json").exists():
            try:
                files = write_report(options.out, report)
            except RunError as error:  # told beside what went wrong before
                troubles.append(Trouble("report", error))
                report["errors"] = [_error(one) for one in troubles]
    return RunResult(report, tuple(files), tuple(troubles))


def _report(
    config: EvalConfig,
    options: Options,
    jobs: Sequence[Job],
    results: Sequence[dict[str, Any]],
    troubles: Sequence[Trouble],
) -> dict[str, Any]:
    return {
        **_plan(config),
        "runs": [job.run for job in jobs],
        "workers": options.workers,
        "tasks": [{name: one[name] for name in one if name != "ids"} for one in results],
        "errors": [_error(one) for one in troubles],
    }


def _plan(config: EvalConfig) -> dict[str, Any]:
    """Head of run.json and report.json."""
    return {
        "format": REPORT_FORMAT,
        "date": now_text(),
        "name": config.name,
        "config": config.to_dict(),
        "config_sha": config.sha(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu")),
    }


def _error(one: Trouble) -> dict[str, str]:
    return {
        "run": one.run,
        "task": one.task,
        "type": type(one.error).__name__,
        "message": str(one.error),
    }


def check_tasks(jobs: Sequence[Job]) -> dict[tuple[str, str], list[Task]]:
    """Build every task once, which checks its definition and data.

    Returns:
        The tasks of each run's entries.

    Raises:
        SettingsError: unknown task, one that a run has twice, or a metric that it does not have.
        DataError: data that cannot be used.
    """
    built: dict[tuple[str, tuple[Path, ...]], list[Task]] = {}
    tasks: dict[tuple[str, str], list[Task]] = {}
    for job in jobs:
        names: set[str] = set()
        for entry in (entry for group in job.tasks for entry in group):
            key = (entry, tuple(job.include_path))
            if key not in built:
                built[key] = find_tasks(entry, job.include_path)
            tasks[job.run, entry] = built[key]
            for task in built[key]:
                if task.name in names:
                    raise SettingsError(
                        f"tasks: {task.name!r} is named twice, perhaps within a group."
                    )
                names.add(task.name)
                metric = job.metric.get(task.name)
                if metric is not None:
                    own = [one.name for one in task.metrics]
                    refuse_unknown([metric], own, f"metric of task {task.name}")
        entries = [entry for group in job.tasks for entry in group]
        built_names = {one: [task.name for task in tasks[job.run, one]] for one in entries}
        check_task_keys(job, built_names)
    return tasks


def _check_only(only: Sequence[str], tasks: Sequence[Task]) -> None:
    known = {one for task in tasks for one in task.ids} if only else set()
    missing = [one for one in only if one not in known]
    if missing:
        first = [list(task.ids[:2]) for task in tasks]
        raise SettingsError(
            f"--only {','.join(missing)}: no task has such a sample; ids look like {first}."
        )
    for task in tasks:
        if only and not selected(task, None, tuple(only)):
            raise SettingsError(
                f"--only: task {task.name} has none of these samples. Leave it out."
            )


@contextlib.contextmanager
def _folder(
    options: Options,
    config: EvalConfig,
    groups: Sequence[Group],
    tasks: Mapping[tuple[str, str], Sequence[Task]],
) -> Iterator[None]:
    """The run's folder for this run alone, with what is planned written down.

    Raises:
        SettingsError: it holds a run (without --resume), none (with it), or answers that do not
            belong to this one.
        RunError: another run works there, or it cannot be written.
    """
    plan = options.out / "run.json"
    if options.resume and not plan.exists():
        raise SettingsError(
            f"--resume: {options.out} holds no run to go on with. Leave --resume out to start one."
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        lock = os.open(options.out / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunError(f"--out {options.out}: cannot be written: {error.strerror}.") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"--out {options.out}: another run works there. Wait for it, stop it, or choose "
                "another folder."
            ) from error
        if plan.exists() and not options.resume:
            raise SettingsError(
                f"--out {options.out}: holds a run already. Go on with it by --resume, or choose "
                "another folder."
            )
        _check_same_tasks(options, plan, groups)
        for group in groups:
            for task in (task for entry in group.entries for task in tasks[group.job.run, entry]):
                path = samples_path(group, task)
                before = header_of(path)
                if before is not None:
                    check_same(path, before, json.loads(json.dumps(identity(group, task))))
        try:
            write_json(plan, _plan(config))
        except OSError as error:
            raise RunError(f"--out {options.out}: cannot be written: {error}.") from error
        yield
    finally:
        os.close(lock)


def _check_same_tasks(options: Options, plan: Path, groups: Sequence[Group]) -> None:
    """A run that goes on may have further tasks, but none of its own may be missing.

    Raises:
        SettingsError: the folder's run is another one.
    """
    if not plan.exists():
        return
    try:
        runs = json.loads(plan.read_text(encoding="utf-8"))["config"]["runs"]
        before = {(run["name"], task) for run in runs for group in run["tasks"] for task in group}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{plan}: is damaged. Choose another --out.") from error
    missing = before - {(group.job.run, entry) for group in groups for entry in group.entries}
    if missing:
        named = ", ".join(sorted(task for _, task in missing))
        raise SettingsError(
            f"--resume: {options.out} holds another run, with {named}. Name its tasks too, or "
            "choose another --out."
        )


def _planned(jobs: Sequence[Job], options: Options) -> tuple[list[Group], list[Trouble]]:
    """The groups of all jobs; of several models, one that is not there does not stop the others."""
    groups: list[Group] = []
    troubles: list[Trouble] = []
    for job in jobs:
        try:
            groups += _groups(job, options)
        except ModelLoadError as error:
            if len(jobs) == 1:
                raise
            troubles.append(Trouble("all tasks", error, job.run))
    return groups, troubles


def _groups(job: Job, options: Options) -> Iterator[Group]:
    sha = job.config_sha()
    for entries in job.tasks:
        yield Group(
            job=job,
            entries=tuple(entries),
            folder=options.out / job.run,
            config_sha=sha,
            only=options.only,
            resume=options.resume,
            workers=options.workers,
            ray_address=options.ray_address,
            threads=options.threads,
            overlays=options.overlays,
        )


def _outcomes(group: Group, names: Sequence[str]) -> Iterator[dict[str, Any] | Trouble]:
    """Run a group in a process of its own and hand on what it says; a task that it says nothing of
    has no result."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=run_in_process, args=(group, send), name="mmlm eval")
    with _interrupts_ignored():  # by the process: Ctrl-C reaches it too, but is the runner's
        process.start()
    send.close()
    missing = list(names)
    try:
        try:
            while True:
                result = receive.recv()
                if isinstance(result, Trouble):
                    told = [result.task] if result.task in missing else list(missing)
                    missing = [name for name in missing if name not in told]
                else:
                    missing = [name for name in missing if name != result["task"]]
                yield result
        except EOFError:
            process.join()
        if missing:
            yield Trouble(", ".join(missing), _died(process.exitcode or 0), group.job.run)
    finally:
        if process.is_alive():
            process.terminate()
            process.join(timeout=30)
        if process.is_alive():
            process.kill()
            process.join()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process that is started inside ignores Ctrl-C from its first moment."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _died(exit_code: int) -> MMLMError:
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        memory = ", perhaps because memory ran out" if name == "SIGKILL" else ""
        how = f"was ended by {name}{memory}"
    else:
        how = f"ended with exit code {exit_code} before it had a result"
    return RunError(
        f"the process of this task group {how}. All answers that it gave are kept: go on with "
        "--resume."
    )
