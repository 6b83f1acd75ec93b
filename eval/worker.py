"""One task group, in a process of its own: tasks are built, the model is loaded, samples asked.

A crash of the model (out of memory, a broken kernel) takes this process and not the runner, and
peaks of memory belong to one group.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from eval.answering import Answers, Batch, LocalAnswers, RayAnswers
from eval.engine import Outcome
from eval.figures import task_result
from eval.find_tasks import find_tasks
from eval.overlays import OVERLAYS, draw_overlay
from eval.plan import Job
from eval.progress import TaskBar
from eval.record import Record, failed_record, record_of
from eval.report_words import file_name
from eval.samples_log import SamplesLog
from eval.task import Sample, Task
from mmlm_efficient.errors import MMLMError, RunError, SettingsError, UnsupportedError
from mmlm_efficient.files import write_json
from mmlm_efficient.machine import now_text, versions
from mmlm_efficient.names import POCKET
from mmlm_efficient.tokens import ImageReport

_LOG = logging.getLogger(__name__)
# Errors by which a method refuses a model.
_REFUSALS = (SettingsError.__name__, UnsupportedError.__name__)


@dataclass(frozen=True)
class Group:
    """All that the process of a task group needs to know.

    Attributes:
        job: model, rows, seed, limits.
        entries: tasks as on the command line.
        folder: of the run's files.
        config_sha: of the job, hex.
        only: ids of the samples to ask; empty means all.
        resume: go on with files that are there.
        workers: Ray workers; 0 asks in this process.
        ray_address: of a running cluster.
        threads: CPU threads; None is torch's choice.
        overlays: samples of each task to draw.
    """

    job: Job
    entries: tuple[str, ...]
    folder: Path
    config_sha: str
    only: tuple[str, ...] = ()
    resume: bool = False
    workers: int = 0
    ray_address: str | None = None
    threads: int | None = None
    overlays: int = OVERLAYS


@dataclass(frozen=True)
class Trouble:
    """Why a task, or a whole group, has no result.

    Attributes:
        task: its name, or the group's entries.
        error: what was raised.
        run: the run that it belongs to.
    """

    task: str
    error: MMLMError
    run: str = ""


def run_in_process(group: Group, results: multiprocessing.connection.Connection) -> None:
    """Run a group in this process, which was started for it; results go to the runner.

    Ctrl-C is the runner's: it ends this process by SIGTERM, which frees what there is to free.

    Args:
        group: what to run.
        results: takes a task's result (a dict) or `Trouble`, as they come.
    """
    signal.signal(signal.SIGTERM, _stop)
    _end_with_parent()
    os.dup2(2, 1)  # what tasks print must not get between the runner's own output
    if group.job.model.model == POCKET:  # no bar for weights that are read in a moment
        transformers_logging.disable_progress_bar()
    if group.workers and group.ray_address is None:
        # Ray's ports take anybody's orders otherwise; to be said before ray is imported.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    with contextlib.suppress(KeyboardInterrupt):
        for result in run_group(group):
            results.send(result)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def run_group(group: Group) -> Iterator[dict[str, Any] | Trouble]:
    """The results of a group's tasks, each when it ends; a task that cannot run is a `Trouble`."""
    if group.threads is not None:
        torch.set_num_threads(group.threads)
    everything = ", ".join(group.entries)
    # Models, tasks and libraries may raise anything; the report is to say it, task by task.
    try:
        tasks = [task for entry in group.entries for task in _found(group, entry)]
        with _answers(group) as answers:
            for task in tasks:
                try:
                    yield run_task(group, task, answers)
                except (Exception, SystemExit) as error:  # noqa: BLE001
                    yield Trouble(task.name, told(error), group.job.run)
    except (Exception, SystemExit) as error:  # noqa: BLE001
        yield Trouble(everything, told(error), group.job.run)


def told(error: BaseException) -> MMLMError:
    """An error as one of ours, whose message says what it is."""
    if isinstance(error, MMLMError):
        return error
    _LOG.debug("unexpected error", exc_info=error)
    return RunError(f"{type(error).__name__}: {error}")


def _found(group: Group, entry: str) -> list[Task]:
    return find_tasks(entry, group.job.include_path)


def _answers(group: Group) -> Answers:
    model = group.job.model
    if group.workers == 0:
        return LocalAnswers(model)
    return RayAnswers(model, group.workers, address=group.ray_address, threads=group.threads)


def run_task(group: Group, task: Task, answers: Answers) -> dict[str, Any]:
    """Ask a task's samples with all rows, write every record as it comes, then the result.

    Args:
        group: what to run.
        task: one of its tasks.
        answers: where answers come from.

    Returns:
        What `task_result` makes of the records; it is written to the task's results file too.

    Raises:
        MMLMError: files of another run, or a file that cannot be written.
    """
    ids = selected(task, group.job.limit, group.only)
    header = {
        **identity(group, task),
        "run": group.job.run,
        "task_version": task.version,
        "source": task.source,
        "metrics": [vars(metric) for metric in task.metrics],
        "seed": group.job.seed,
        "versions": versions(),
        "hardware": dict(answers.place.hardware),
        "threads": answers.place.threads,
        "workers": group.workers,
        "date": now_text(),
    }
    labels = header["rows"]
    with SamplesLog(samples_path(group, task), header, resume=group.resume) as log:
        _TaskRun(group, task, ids, log, answers).run()
        wanted = set(ids)
        records = [one for one in log.records if one["id"] in wanted and one["row"] in labels]
        header = {**log.header, "rows": labels}
    result = task_result(
        header,
        records,
        task.aggregate,
        primary=group.job.metric.get(task.name),
        ids=ids,
        expected=group.job.expected.get(task.name),
        expected_source=group.job.expected_source,
        scale=group.job.scale.get(task.name, 1.0),
    )
    result |= {"limit": group.job.limit, "only": list(group.only)}
    if task.name in group.job.notes:
        result["notes"] = group.job.notes[task.name]
    if task.name in group.job.not_compared:
        result["not_compared"] = dict(group.job.not_compared[task.name])
    _write(group.folder / f"{file_name(task.name)}.results.json", result)
    return result


def samples_path(group: Group, task: Task) -> Path:
    """The samples file of a task."""
    return group.folder / f"{file_name(task.name)}.samples.jsonl"


def identity(group: Group, task: Task) -> dict[str, Any]:
    """What has to be the same when a run goes on; see `check_same`."""
    return {
        "task": task.name,
        "config_sha": group.config_sha,
        "data_sha": task.data_sha,
        "rows": group.job.row_settings(),
    }


@dataclass
class _TaskRun:
    """One pass over a task's samples.

    Attributes:
        shown: for samples that are drawn: what each row kept and said, until all rows are in.
    """

    group: Group
    task: Task
    ids: list[str]
    log: SamplesLog
    answers: Answers
    shown: dict[str, dict[str, tuple[tuple[ImageReport, ...], str]]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        rows = self.group.job.rows
        self.numbers = {one: number for number, one in enumerate(self.ids)}
        todo = [one for one in self.ids if self._rows_left(one)]
        drawn = [
            one for one in self.ids[: self.group.overlays] if len(self._rows_left(one)) == len(rows)
        ]
        self.shown = {one: {} for one in drawn}
        labels = {row.label for row in rows}
        asked = [
            one for one in self.log.records if one["id"] in self.numbers and one["row"] in labels
        ]
        with TaskBar(self.task, len(self.ids) * len(rows), asked) as bar:
            self.bar = bar
            if todo:
                self._warm_up(todo[0])
            for batch, label, outcomes in self.answers.run(self._batches(todo)):
                samples = {sample.id: sample for sample in batch.samples}
                records = [record_of(label, samples[one.id], one, self.task) for one in outcomes]
                self._keep(records)
                for outcome in outcomes:
                    self._show(label, samples[outcome.id], outcome)

    def _rows_left(self, sample_id: str) -> list[str]:
        return [
            row.label for row in self.group.job.rows if not self.log.finished(row.label, sample_id)
        ]

    def _warm_up(self, sample_id: str) -> None:
        """Ask once with every row before it counts: first calls are slow, and a row that does not
        fit the model is refused now and not once for every sample.

        Raises:
            SettingsError: naming the row.
        """
        try:
            sample = self._sample(sample_id)
        except Exception:  # noqa: BLE001
            return  # it is recorded as failed when its turn comes
        rows = {row.label: (row.methods, frozenset([sample_id])) for row in self.group.job.rows}
        errors: dict[str, Any] = {}
        for _, label, outcomes in self.answers.run([Batch((sample,), rows)]):
            errors[label] = outcomes[0].error
        for label, error in errors.items():
            if (
                error
                and error["type"] in _REFUSALS
                and errors[self.group.job.rows[0].label] is None
            ):
                raise SettingsError(f"row {label}: {error['message']}")

    def _sample(self, sample_id: str) -> Sample:
        """A sample, with the run's own generation settings before the task's."""
        sample = self.task.sample(sample_id)
        own = self.group.job.model.generation
        return replace(sample, generation={**sample.generation, **own}) if own else sample

    def _batches(self, todo: list[str]) -> Iterator[Batch]:
        """The samples that are left, with their media; those without are recorded as failed."""
        size = self.group.job.batch_size
        for start in range(0, len(todo), size):
            samples: list[Sample] = []
            for one in todo[start : start + size]:
                # Tasks bring their own code and files, which may raise anything.
                try:
                    samples.append(self._sample(one))
                except Exception as error:  # noqa: BLE001
                    left = self._rows_left(one)
                    self._keep([failed_record(row, one, error, "media") for row in left])
            if samples:
                yield self._batch(samples)

    def _batch(self, samples: list[Sample]) -> Batch:
        rows = {}
        for row in self.group.job.rows:
            left = frozenset(one.id for one in samples if not self.log.finished(row.label, one.id))
            if left:
                rows[row.label] = (row.methods, left)
        keep = frozenset(one.id for one in samples if one.id in self.shown)
        return Batch(tuple(samples), rows, keep, self.group.job.seed)

    def _keep(self, records: list[Record]) -> None:
        self.log.append(records)
        self.bar.add(records)

    def _show(self, label: str, sample: Sample, outcome: Outcome) -> None:
        """Draw a sample once all rows have answered it."""
        rows = self.shown.get(sample.id)
        if rows is None or outcome.text is None:
            return
        rows[label] = (outcome.images, outcome.text)
        if len(rows) < len(self.group.job.rows) or not outcome.images:
            return
        number = self.numbers[sample.id]
        name = f"{number:04d}-{file_name(sample.id)}.png"
        path = self.group.folder / "overlays" / file_name(self.task.name) / name
        labels = [row.label for row in self.group.job.rows]
        kept = {one: rows[one][0] for one in labels}
        said = {one: rows[one][1] for one in labels}
        try:
            place = self.answers.place
            draw_overlay(path, sample, kept, said, place.fit, sampling=place.sampling)
        except Exception as error:  # noqa: BLE001  answers are worth more than their pictures
            _LOG.warning("%s: sample %s is not drawn: %s", self.task.name, sample.id, error)
        del self.shown[sample.id]


def selected(task: Task, limit: int | None, only: tuple[str, ...]) -> list[str]:
    """The ids of the samples that a run asks."""
    ids = list(task.ids)
    if only:
        wanted = set(only)
        ids = [one for one in ids if one in wanted]
    return ids[:limit]


def _write(path: Path, result: Mapping[str, Any]) -> None:
    try:
        write_json(path, result)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written: {error.strerror}. All answers are kept: make room and go "
            "on with --resume."
        ) from error


def _end_with_parent() -> None:
    """End this process when the runner has gone, however that came about."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
