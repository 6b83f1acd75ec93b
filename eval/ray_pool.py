"""Work on many items by several processes of Ray, on this machine or a cluster.

A pool has N workers (Ray actors). Each makes its own function once, such as one that holds a
model, and then does one item at a time. Every item comes back exactly once, whatever happens to
the workers: an item whose worker was killed is done again by another one.

What the pool decides:

- Without an address it starts a Ray of its own and stops it again; the environment's RAY_ADDRESS
  is then ignored, so that no run lands on a cluster by accident. ``address="auto"`` follows it. A
  Ray that this process has already is used as it is and left running.
- Ray's own Ray sends no usage statistics. Its ports are open to the network of the machine, as
  always with Ray: where that is not trusted, set RAY_AUTH_MODE=token (Ray's documentation).
- What workers print stays in Ray's logs (/tmp/ray/session_latest/logs), so that progress bars and
  JSON on stdout stay whole.
- Ray's processes die with the thread that started them, even when it is killed: make a pool in
  the thread that lives as long as the pool, in general the main one. After a SIGKILL the workers
  are gone in seconds; two idle agents of Ray (they try for 60 s to report it) follow by themselves.
- An exception of the function is a bug or a broken disk, not a property of an item: it ends the
  run. Functions turn what may fail into results.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from mmlm_efficient.errors import MMLMError, RunError, SettingsError, require_extra

T = TypeVar("T")
R = TypeVar("R")

# Give up when so many workers in a row died before they could do anything, and when so many items
# in a row were given up: then it is not the items.
DEATHS_IN_A_ROW = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerDied:
    """The result of an item whose workers were killed again and again.

    Attributes:
        message: how often, and what Ray knows of the last death.
    """

    message: str


class _Actor:
    """What runs in a worker's process."""

    def place(self) -> str:
        return f"process {os.getpid()} on {socket.gethostname()}"

    def load(self, threads: int, make: Callable[[], Callable[[Any], Any]]) -> None:
        import torch

        torch.set_num_threads(threads)
        self._function = make()

    def do(self, item: Any) -> Any:
        return self._function(item)


@dataclass(eq=False)
class _Job(Generic[T]):
    item: T
    deaths: int = 0


@dataclass(eq=False)
class _Worker(Generic[T]):
    """An actor and the one call it is busy with.

    `waits` is that call's reference (None: idle). The first call finds it a place, until
    `deadline`; the second loads; all others do a job each.
    """

    actor: Any
    waits: Any
    deadline: float | None
    place: str = "not placed yet"
    loaded: bool = False
    job: _Job[T] | None = None


class RayPool(Generic[T, R]):
    """N workers, each a process with a function of its own; a context manager.

    Args:
        make: called once in each worker; returns the function that does one item. Sent by
            cloudpickle: what a module defines must be importable on the workers' machines
            (this package installed there), closures travel by value.
        workers: how many, 1 or more.
        address: None for a Ray of its own on this machine; "auto" for RAY_ADDRESS or else the
            Ray that runs on this machine; "host:port" or "ray://host:port" for a cluster.
        threads: of torch in each worker, each reserved as one CPU of Ray's. Default: this
            machine's cores by `workers` on this machine, 1 on a cluster. As everywhere in torch
            the number may change the last bits of a result.
        gpus_per_worker: reserved for each worker, may be a fraction; a worker sees its own only.
            With 0 none is reserved: the workers share all GPUs of the machine.
        retries: how often an item is done again after its worker was killed.
        start_timeout_s: how long a worker may wait for its place, in seconds: on a cluster, time
            to scale up or to become free. Loading is not limited.
        connect_timeout_s: how long a cluster has to answer, in seconds.

    Attributes:
        workers, threads: as above, resolved.

    Raises:
        SettingsError: a number is out of range.
        MissingExtraError: Ray is not installed.
        RunError: no Ray at the address, not enough CPUs or GPUs for the workers, `make` failed
            (with its own message), or the workers die while they load.

    Example:
        with RayPool(load_model, workers=2) as pool:
            for item, result in pool.run(items):
                ...
    """

    def __init__(
        self,
        make: Callable[[], Callable[[T], R]],
        workers: int,
        *,
        address: str | None = None,
        threads: int | None = None,
        gpus_per_worker: float = 0,
        retries: int = 2,
        start_timeout_s: float = 60,
        connect_timeout_s: float = 15,
    ) -> None:
        _check("workers", workers, 1)
        _check("threads", 1 if threads is None else threads, 1)
        _check("gpus_per_worker", gpus_per_worker, 0)
        _check("retries", retries, 0)
        self.workers = workers
        self.threads = threads or _default_threads(workers, address)
        self._gpus, self._retries, self._start_timeout_s = gpus_per_worker, retries, start_timeout_s
        self._pool: list[_Worker[T]] = []
        self._ready: deque[_Job[T]] = deque()
        self._size = workers  # falls when a worker died and no place is left for another
        self._started = self._running = self._closed = False
        self._deaths_at_start = self._lost_in_a_row = 0
        self._ray = _import_ray()
        self._owns_ray = not self._ray.is_initialized()
        self._address = address
        if address is not None and not self._owns_ray:
            raise RunError(
                f"This process is connected to a Ray already; it cannot go to {address!r} too. "
                "Leave the address out to use that Ray, or call ray.shutdown() before."
            )
        try:
            if self._owns_ray:
                self._connect(connect_timeout_s)
            self._make = self._ray.put(make)
            self._start_missing()
            while any(not worker.loaded for worker in self._pool):
                self._step(None)
                self._start_missing()
            self._started = True
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers, and stop Ray if this pool started it (or leave the cluster)."""
        if self._closed:
            return
        self._closed = True
        try:
            for worker in self._pool:
                self._kill(worker)
            self._pool.clear()
        finally:
            if self._owns_ray:
                self._ray.shutdown()

    def run(self, items: Iterable[T]) -> Iterator[tuple[T, R | WorkerDied]]:
        """Do all items; results as they come, in any order, each with its item.

        Items are taken one at a time and only when there is room: at most 2 for each worker are
        taken and not yet given back, so `items` may load media or never end. One run at a time.
        A run that is not finished (an error, or the caller stops) kills the workers that are
        busy; the next run starts others.

        Raises:
            RunError: the function raised (its exception is the cause), an item cannot be sent,
                or workers keep dying. Whatever `items` raises goes through.
        """
        if self._closed or self._running:
            what = "is closed" if self._closed else "is busy with another run"
            raise RunError(f"This pool of workers {what}. Make another one.")
        self._running = True
        try:
            yield from self._results(iter(items))
        finally:
            self._running = False
            self._ready.clear()
            for worker in [worker for worker in self._pool if worker.job is not None]:
                self._kill(worker)
                self._pool.remove(worker)

    def _results(self, items: Iterator[T]) -> Iterator[tuple[T, R | WorkerDied]]:
        out = 0  # taken from items and not yet given back
        more = True
        while True:
            if more and out < 2 * self.workers:
                try:
                    self._ready.append(_Job(next(items)))
                    out += 1
                except StopIteration:
                    more = False
            if out == 0 and not more:
                return
            self._dispatch()
            full = not more or out >= 2 * self.workers
            finished = self._step(None if full else 0)
            if finished is not None:
                self._dispatch()  # before the caller gets busy with the result
                out -= 1
                yield finished

    def _dispatch(self) -> None:
        """Give every idle worker a job, while there are any; replace dead workers."""
        for worker in self._pool:
            if not self._ready:
                return
            if worker.waits is None:
                job = self._ready.popleft()
                try:
                    worker.waits = worker.actor.do.remote(job.item)
                except (TypeError, self._ray.exceptions.RayError) as error:
                    raise RunError(f"An item cannot be sent to a worker: {error}") from error
                worker.job = job
        if self._ready:
            self._start_missing()

    def _start_missing(self) -> None:
        actors = self._ray.remote(_Actor).options(
            num_cpus=self.threads,
            num_gpus=self._gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self.threads)}},
        )
        while len(self._pool) < self._size:
            actor = actors.remote()
            deadline = time.monotonic() + self._start_timeout_s
            self._pool.append(_Worker(actor, actor.place.remote(), deadline))

    def _step(self, timeout_s: float | None) -> tuple[T, R | WorkerDied] | None:
        """Wait until one call of a worker has ended, at most so long; a result if it was a job's.

        With None, wait until something happened (a worker that found no place counts).
        """
        waiting = {worker.waits: worker for worker in self._pool if worker.waits is not None}
        deadlines = [w.deadline for w in waiting.values() if w.deadline is not None]
        if timeout_s is None and deadlines:
            timeout_s = max(0.0, min(deadlines) - time.monotonic())
        done, _ = self._ray.wait(list(waiting), num_returns=1, timeout=timeout_s)
        if not done:
            self._drop_unplaced()
            return None
        worker = waiting[done[0]]
        try:
            value = self._ray.get(done[0])
        except self._ray.exceptions.RayError as error:
            if not self._is_death(error):
                raise self._failed(worker, error) from _cause(error)
            return self._died(worker, _why(error))
        return self._moved_on(worker, value)

    def _moved_on(self, worker: _Worker[T], value: Any) -> tuple[T, R] | None:
        """A worker's call has returned: what next."""
        worker.waits = None
        if worker.deadline is not None:
            worker.place, worker.deadline = value, None
            worker.waits = worker.actor.load.remote(self.threads, self._make)
            return None
        self._deaths_at_start = 0
        if worker.job is None:
            worker.loaded = True
            return None
        self._lost_in_a_row = 0
        job, worker.job = worker.job, None
        return job.item, value

    def _died(self, worker: _Worker[T], why: str) -> tuple[T, WorkerDied] | None:
        """Remove a dead worker; its job waits for another one, or has had enough of them."""
        self._kill(worker)
        self._pool.remove(worker)
        job = worker.job
        if job is None:
            self._deaths_at_start += 1
            if self._deaths_at_start >= DEATHS_IN_A_ROW:
                raise RunError(
                    f"{DEATHS_IN_A_ROW} workers in a row died before they had loaded, the last "
                    f"({worker.place}): {why}. With fewer workers there is more memory for each."
                )
            return None
        job.deaths += 1
        _log.warning("A worker (%s) died: %s", worker.place, why)
        if job.deaths <= self._retries:
            self._ready.append(job)  # behind the others: perhaps it is to blame
            return None
        self._lost_in_a_row += 1
        if self._lost_in_a_row >= DEATHS_IN_A_ROW:
            raise RunError(
                f"Workers keep dying: {DEATHS_IN_A_ROW} items in a row were given up after "
                f"{job.deaths} workers each, and none was finished in between. The last worker "
                f"({worker.place}): {why}. With fewer workers there is more memory for each."
            )
        return job.item, WorkerDied(
            f"{job.deaths} workers died while they worked on it, the last ({worker.place}): {why}"
        )

    def _drop_unplaced(self) -> None:
        """Give up workers that have waited too long for a place."""
        now = time.monotonic()
        late = [w for w in self._pool if w.deadline is not None and w.deadline <= now]
        if not late:
            return
        placed = len(self._pool) - len(late)
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        needs = f"{self.threads} CPU(s)" + (f" and {self._gpus:g} GPU(s)" if self._gpus else "")
        has = ", ".join(
            f"{total.get(name, 0):g} {name}(s) of which {free.get(name, 0):g} are free now"
            for name in ("CPU", "GPU")
        )
        message = (
            f"Ray found a place for {placed} of {self._size} workers in "
            f"{self._start_timeout_s:g} s. Each needs {needs}; there are {has}. Ask for fewer "
            "workers or threads, or wait until others have finished."
        )
        if not self._started or not placed:
            raise RunError(message)
        _log.warning("A dead worker cannot be replaced; going on without it. %s", message)
        for worker in late:
            self._kill(worker)
            self._pool.remove(worker)
        self._size = placed

    def _failed(self, worker: _Worker[T], error: Exception) -> RunError:
        """The error of a run whose worker raised."""
        cause = _cause(error)
        own = str(cause) if isinstance(cause, MMLMError) else f"{type(cause).__name__}: {cause}"
        if isinstance(error, self._ray.exceptions.RayTaskError):
            doing = "working on an item" if worker.loaded else "loading"
            return RunError(f"A worker ({worker.place}) failed while {doing}: {own}")
        return RunError(f"Ray could not run a worker ({worker.place}): {own}")

    def _is_death(self, error: Exception) -> bool:
        """Whether a process or its node is gone, and not: something raised."""
        names = ("RayActorError", "WorkerCrashedError", "NodeDiedError", "OutOfMemoryError")
        kinds = tuple(getattr(self._ray.exceptions, name) for name in (*names, "ObjectLostError"))
        return isinstance(error, kinds) and not getattr(error, "actor_init_failed", False)

    def _kill(self, worker: _Worker[T]) -> None:
        # Ray may be gone, or this actor: then there is nothing left to kill.
        with contextlib.suppress(self._ray.exceptions.RayError, ConnectionError, ValueError):
            self._ray.kill(worker.actor)

    def _connect(self, connect_timeout_s: float) -> None:
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        if self._address is not None:
            _probe(self._address, connect_timeout_s)
            with _signals_kept():
                self._ray.init(address=self._address, **quiet)
            return
        try:
            with _signals_kept(), _environment("RAY_USAGE_STATS_ENABLED", "0"):
                self._ray.init(
                    address="local",  # whatever RAY_ADDRESS says
                    num_cpus=self.workers * self.threads,
                    include_dashboard=False,
                    **quiet,
                )
        except (RuntimeError, OSError, ValueError, self._ray.exceptions.RayError) as error:
            raise RunError(f"Ray could not be started on this machine: {error}") from error
        gpus = self._ray.cluster_resources().get("GPU", 0)
        if self._gpus * self.workers > gpus:
            raise RunError(
                f"{self.workers} workers with {self._gpus:g} GPU(s) each need more than the "
                f"{gpus:g} GPU(s) of this machine. Ask for fewer workers or a smaller share."
            )


def _check(name: str, value: float, least: int) -> None:
    if value < least:
        raise SettingsError(f"{name} is {value}; it must be {least} or more.")


def _default_threads(workers: int, address: str | None) -> int:
    return max(1, (os.cpu_count() or 1) // workers) if address is None else 1


def _import_ray() -> Any:
    # Ray prints this to stdout when a worker is killed; the pool has its own warning. Read by
    # Ray when it is imported.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
    return require_extra("ray", "eval")


def _probe(address: str, timeout_s: float) -> None:
    """Connect to a cluster in another process, because Ray's own attempt may take minutes or
    even end the process."""
    code = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level=40)"
    hint = (
        "Check the address (host:port of the head node, ray://host:port, or auto) and that the "
        "same versions of Ray and Python run there."
    )
    try:
        subprocess.run(
            [sys.executable, "-c", code, address],
            check=True,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        message = f"No Ray cluster answers at {address!r} within {timeout_s:g} s. {hint}"
        raise RunError(message) from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        message = f"No Ray cluster can be used at {address!r}: {lines[-1]} {hint}"
        raise RunError(message) from None


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Undo that ray.init takes SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def _cause(error: Exception) -> BaseException:
    """What the function raised, out of Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _why(error: Exception) -> str:
    """What Ray knows of a death, in one sentence.

    Example:
        >>> _why(RuntimeError("died\\nWorker exit detail: Worker exits with an exit code 3."))
        'Worker exits with an exit code 3'
    """
    text = str(error).strip().splitlines()[-1]
    text = text.partition("Worker exit detail: ")[2] or text
    if "connection error code" in text:
        return "it was killed, often by the system for want of memory, or it crashed"
    return text.partition(" Some common causes")[0].rstrip(". ")
