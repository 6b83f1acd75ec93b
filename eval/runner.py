"""The evaluation runner: methods x budgets x tasks, in one command that tells the truth.

Everything is checked before a model is loaded. Each task group then runs in a process of its own
(`worker`), which writes every answer as it comes; the runner collects the results of the tasks,
writes the report, and says by its exit code what happened.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.find_tasks import find_tasks
from eval.plan import EvalConfig, Job
from eval.report import write_report
from eval.task import Task
from eval.worker import OVERLAYS, Group, Trouble, run_in_process, selected
from mmlm_efficient.errors import MMLMError, ModelLoadError, RunError, SettingsError
from mmlm_efficient.files import write_json
from mmlm_efficient.machine import now_text, versions
from mmlm_efficient.settings import refuse_unknown

GOOD, FAILED, WRONG_USAGE, FAILED_SAMPLES = 0, 1, 2, 3
REPORT_FORMAT = 1


@dataclass(frozen=True)
class Options:
    """How a configuration is run; none of it changes an answer.

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
        exit_code: 0 all good; 1 something has no result; 2 because of wrong usage; 3 all have
            results, but samples failed.
    """

    report: dict[str, Any]
    files: tuple[Path, ...]
    troubles: tuple[Trouble, ...] = ()
    exit_code: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "exit_code", _exit_code(self.report, self.troubles))


def _exit_code(report: dict[str, Any], troubles: Sequence[Trouble]) -> int:
    rows = [row for task in report["tasks"] for row in task["rows"]]
    if troubles:
        usage = all(isinstance(one.error, SettingsError) for one in troubles) and not rows
        return WRONG_USAGE if usage else FAILED
    if any(row["samples"] == 0 for row in rows):
        return FAILED
    return FAILED_SAMPLES if any(row["failed"] for row in rows) else GOOD


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
    tasks = check_tasks(jobs)
    _check_only(options.only, tasks)
    groups, troubles = _planned(jobs, options)
    _open_folder(options, config)
    results: list[dict[str, Any]] = []
    for group in groups:
        for result in _outcomes(group):
            if isinstance(result, Trouble):
                troubles.append(result)
            else:
                results.append(result)
    report = {
        "format": REPORT_FORMAT,
        "date": now_text(),
        "name": config.name,
        "config": config.to_dict(),
        "config_sha": config.sha(),
        "versions": versions(),
        "runs": [job.run for job in jobs],
        "workers": options.workers,
        "tasks": results,
        "errors": [
            {
                "run": one.run,
                "task": one.task,
                "type": type(one.error).__name__,
                "message": str(one.error),
            }
            for one in troubles
        ],
        "seconds": round(time.perf_counter() - start, 1),
    }
    files: list[Path] = []
    try:
        files = write_report(options.out, report)
    except RunError as error:  # told beside what went wrong before
        troubles.append(Trouble("report", error))
    return RunResult(report, tuple(files), tuple(troubles))


def check_tasks(jobs: Sequence[Job]) -> list[Task]:
    """Build every task once, which checks its definition and data.

    Raises:
        SettingsError: unknown task, or a metric that a task does not have.
        DataError: data that cannot be used.
    """
    found: dict[tuple[str, tuple[Path, ...]], list[Task]] = {}
    for job in jobs:
        for entry in (entry for group in job.tasks for entry in group):
            key = (entry, tuple(job.include_path))
            if key not in found:
                found[key] = find_tasks(entry, job.include_path)
            for task in found[key]:
                metric = job.metric.get(task.name)
                if metric is not None:
                    names = [one.name for one in task.metrics]
                    refuse_unknown([metric], names, f"metric of task {task.name}")
    tasks = [task for group in found.values() for task in group]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"tasks: {name!r} is named twice, perhaps within a group.")
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


def _open_folder(options: Options, config: EvalConfig) -> None:
    plan = options.out / "run.json"
    if plan.exists() and not options.resume:
        raise SettingsError(
            f"--out {options.out}: holds a run already. Go on with it by --resume, or choose "
            "another folder."
        )
    if options.resume and not plan.exists():
        raise SettingsError(
            f"--resume: {options.out} holds no run to go on with. Leave --resume out to start one."
        )
    try:
        write_json(plan, {"format": REPORT_FORMAT, "date": now_text(), "config": config.to_dict()})
    except OSError as error:
        raise RunError(f"--out {options.out}: cannot be written: {error}.") from error


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


def _outcomes(group: Group) -> Iterator[dict[str, Any] | Trouble]:
    """Run a group in a process of its own and hand on what it says."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=run_in_process, args=(group, send), name="mmlm eval")
    process.start()
    send.close()
    try:
        try:
            while True:
                yield receive.recv()
        except EOFError:
            process.join()
        if process.exitcode:
            yield Trouble(", ".join(group.entries), _died(process.exitcode), group.job.run)
    finally:
        if process.is_alive():  # Ctrl-C: the process got it too and is closing its files
            process.join(timeout=30)
        if process.is_alive():
            process.kill()
            process.join()


def _died(exit_code: int) -> MMLMError:
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        memory = ", perhaps because memory ran out" if name == "SIGKILL" else ""
        how = f"was ended by {name}{memory}"
    else:
        how = f"ended with exit code {exit_code}; the reason is above"
    return RunError(
        f"the process of this task group {how}. All answers that it gave are kept: go on with "
        "--resume."
    )
