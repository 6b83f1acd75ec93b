"""Where answers come from: a model in this process, or Ray workers with a model each.

Both run the same function on the same batches, so that results do not depend on the choice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from eval.engine import Engine, Outcome, failure
from eval.task import Sample
from mmlm_efficient import EfficientLMM, load
from mmlm_efficient.errors import RunError, SettingsError
from mmlm_efficient.families.base import Fit
from mmlm_efficient.loading import check_device
from mmlm_efficient.machine import hardware
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.settings import Config
from mmlm_efficient.video.sampling import FrameSampling


@dataclass(frozen=True)
class Batch:
    """Samples that go through some rows together.

    Attributes:
        samples: with their media.
        rows: for each row's label its methods and the ids that are still to be answered.
        keep_images: ids whose image reports are wanted, for overlays.
        seed: of sampling.
    """

    samples: tuple[Sample, ...]
    rows: Mapping[str, tuple[tuple[Method, ...], frozenset[str]]]
    keep_images: frozenset[str] = frozenset()
    seed: int = 0


@dataclass(frozen=True)
class Place:
    """Where a model runs, for the head of files.

    Attributes:
        hardware: of the machine, see `hardware`.
        threads: CPU threads of one process.
        fit: how pictures are made to fit the tower.
        sampling: which frames of a video are taken.
    """

    hardware: Mapping[str, Any]
    threads: int
    fit: Fit
    sampling: FrameSampling


Answered = tuple[Batch, str, list[Outcome]]


class Answers(Protocol):
    """Answers batches; a context manager that frees the model at its end."""

    place: Place

    def run(self, batches: Iterable[Batch]) -> Iterator[Answered]:
        """Batch, row and outcomes (in the order of the batch's samples), as they come."""
        ...

    def __enter__(self) -> Answers: ...

    def __exit__(self, *_: object) -> None: ...


def answer_batch(engine: Engine, batch: Batch) -> Iterator[tuple[str, list[Outcome]]]:
    """The outcomes of a batch, row by row.

    Args:
        engine: asks the model.
        batch: what to ask.
    """
    for label, (methods, ids) in batch.rows.items():
        samples = [sample for sample in batch.samples if sample.id in ids]
        outcomes = engine.answer(samples, methods, batch.seed)
        yield (
            label,
            [one if one.id in batch.keep_images else replace(one, images=()) for one in outcomes],
        )


def place_of(lmm: EfficientLMM) -> Place:
    """Where this process runs a model."""
    return Place(
        hardware(lmm.parts.family.input_device),
        torch.get_num_threads(),
        lmm.image_fit,
        lmm.sampling,
    )


class LocalAnswers:
    """A model in this process.

    Args:
        model: what to load; its methods are not used.
    """

    def __init__(self, model: Config) -> None:
        self._lmm = load(**{**model.load_options(), "methods": ()})
        self._engine = Engine(self._lmm)
        self.place = place_of(self._lmm)

    def run(self, batches: Iterable[Batch]) -> Iterator[Answered]:
        """See `Answers`; every row is given out as soon as it is answered."""
        for batch in batches:
            for label, outcomes in answer_batch(self._engine, batch):
                yield batch, label, outcomes

    def __enter__(self) -> LocalAnswers:
        return self

    def __exit__(self, *_: object) -> None:
        self._lmm.close()


@dataclass(frozen=True)
class _WhereAreYou:
    """Asks a worker for its place instead of answers."""


class RayAnswers:
    """A pool of Ray workers with a model each.

    Args:
        model: what each worker loads.
        workers: how many.
        address: of a running cluster; None starts Ray on this machine.
        threads: CPU threads of each worker; None shares the cores.
    """

    def __init__(
        self, model: Config, workers: int, *, address: str | None, threads: int | None
    ) -> None:
        from eval.ray_pool import RayPool

        device = _worker_device(model.device, address)
        gpus = 1.0 if device == "cuda" else 0.0
        model = model.model_copy(update={"device": device})
        self._pool = RayPool(
            functools.partial(_worker, model),
            workers,
            address=address,
            threads=threads,
            gpus_per_worker=gpus,
        )
        try:
            [(_, place)] = self._pool.run([_WhereAreYou()])
            if not isinstance(place, Place):
                raise RunError(f"Ray workers: the first one died. {place.message}")
            self.place: Place = place
        except BaseException:
            self._pool.close()
            raise

    def run(self, batches: Iterable[Batch]) -> Iterator[Answered]:
        """See `Answers`; batches come back in any order, and a batch whose workers died again and
        again comes back as failed samples."""
        from eval.ray_pool import WorkerDied

        for batch, result in self._pool.run(batches):
            if isinstance(result, WorkerDied):
                for label, (_, ids) in batch.rows.items():
                    lost = [one for one in batch.samples if one.id in ids]
                    error = RunError(result.message)
                    yield batch, label, [failure(one.id, error, "worker") for one in lost]
            else:
                for label, outcomes in result:
                    yield batch, label, outcomes

    def __enter__(self) -> RayAnswers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()


def _worker_device(device: str, address: str | None) -> str:
    """Where each worker has its model; on GPUs each has one of its own.

    Raises:
        SettingsError: a single GPU for all, or the choice left to machines that are not this one.
    """
    if device == "auto" and address is None:
        return check_device(device).type
    if device in ("cpu", "cuda"):
        return device
    raise SettingsError(
        f"device {device!r}: with Ray workers, give cpu, or cuda for a GPU of each worker's own."
    )


def _worker(model: Config) -> Callable[[Any], Any]:
    """In a Ray worker: load the model once, then answer batches."""
    lmm = load(**{**model.load_options(), "methods": ()})
    engine = Engine(lmm)

    def work(item: Batch | _WhereAreYou) -> Any:
        if isinstance(item, _WhereAreYou):
            return place_of(lmm)
        return list(answer_batch(engine, item))

    return work
