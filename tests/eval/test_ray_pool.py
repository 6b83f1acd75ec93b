"""Workers on Ray: every item comes back once, whatever happens to the workers.

Functions that go to workers are closures, which travel by value.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mmlm_efficient.errors import MMLMError, ModelLoadError, RunError, SettingsError

ray = pytest.importorskip("ray")

from eval.ray_pool import RayPool, WorkerDied  # noqa: E402

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


# First those for which this process must not have a Ray yet.


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1023", "No Ray cluster .* '127.0.0.1:1023'"),
        ("nonsense", "'nonsense': .*Invalid address format: nonsense"),
    ],
)
def test_an_address_without_a_cluster(address: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(RunError, match=message):
        RayPool(squares, workers=1, address=address, connect_timeout_s=3)
    assert time.monotonic() - start < 10
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    "wrong", [{"workers": 0}, {"threads": 0}, {"gpus_per_worker": -1}, {"retries": -1}]
)
def test_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"{next(iter(wrong))} is .* must be"):
        RayPool(squares, **{"workers": 1, **wrong})


def test_ray_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MMLMError, match=r"pip install 'mmlm-efficient\[eval\]'"):
        RayPool(squares, workers=1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of the caller's, with 2 CPUs, that all pools of this module use."""
    before = signal.getsignal(signal.SIGTERM)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    assert ray.is_initialized()  # the pools have left it alone
    ray.shutdown()
    signal.signal(signal.SIGTERM, before)


Call = tuple[Callable[[Any], Any], Any]


def make_caller() -> Callable[[Call], Any]:
    """For a pool whose items say themselves what to do: a function and its argument."""
    return lambda call: call[0](call[1])


@pytest.fixture(scope="module")
def pool(cluster: None) -> Iterator[RayPool[Call, Any]]:
    with RayPool(make_caller, workers=2, threads=1, retries=1) as one:
        yield one


def do(
    pool: RayPool[Call, Any], function: Callable[[Any], Any], arguments: Iterable[Any]
) -> list[tuple[Any, Any]]:
    """Arguments and results, as they come."""
    calls = ((function, argument) for argument in arguments)
    return [(argument, result) for (_, argument), result in pool.run(calls)]


def squares() -> Callable[[int], int]:
    return lambda item: item * item


def test_results_equal_those_in_this_process(pool: RayPool[Call, Any]) -> None:
    square = squares()
    expected = [(item, square(item)) for item in range(40)]
    assert sorted(do(pool, square, range(40))) == expected
    assert sorted(do(pool, square, reversed(range(40)))) == expected
    assert do(pool, square, []) == []


def test_workers_are_two_processes_with_their_own_threads(pool: RayPool[Call, Any]) -> None:
    def where(item: int) -> tuple[int, int, str | None]:
        import torch

        time.sleep(0.05)
        return os.getpid(), torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")

    places = {result for _, result in do(pool, where, range(8))}
    assert len({place[0] for place in places}) == 2
    assert os.getpid() not in {place[0] for place in places}
    assert {place[1:] for place in places} == {(1, "1")}


def test_items_are_taken_when_there_is_room_and_not_sooner(pool: RayPool[Call, Any]) -> None:
    square = squares()
    taken = given = 0
    ahead = []

    def endless() -> Iterator[Call]:
        nonlocal taken
        while True:
            taken += 1
            ahead.append(taken - given)
            yield square, taken

    for (_, item), result in pool.run(endless()):
        given += 1
        assert result == item * item
        if given == 30:
            break
    assert max(ahead) == 4
    # What was left half done does not come up in the next run.
    assert sorted(do(pool, square, [1, 2, 3])) == [(1, 1), (2, 4), (3, 9)]


def test_a_fast_worker_does_not_wait_for_a_slow_item(pool: RayPool[Call, Any]) -> None:
    do(pool, squares(), [1, 2])  # both are loaded

    def sleep(seconds: float) -> None:
        time.sleep(seconds)

    order = [item for item, _ in do(pool, sleep, [8.0, 0.01, 0.02, 0.03, 0.04])]
    assert order == [0.01, 0.02, 0.03, 0.04, 8.0]


def test_items_of_killed_workers_are_done_again(pool: RayPool[Call, Any], tmp_path: Path) -> None:
    def square(item: int) -> int:
        mark = tmp_path / str(item)
        if item in (3, 17) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item

    results = sorted(do(pool, square, range(24)))
    assert {path.name for path in tmp_path.iterdir()} == {"3", "17"}
    assert results == [(item, item * item) for item in range(24)]


def test_an_item_that_kills_every_worker_does_not_take_the_others_down(
    pool: RayPool[Call, Any],
) -> None:
    def square(item: int) -> int:
        if item == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item

    results = dict(do(pool, square, range(12)))
    died = results.pop(5)
    assert isinstance(died, WorkerDied)
    assert died.message.startswith("2 workers died while they worked on it, the last (process ")
    assert "it was killed, often by the system for want of memory" in died.message
    assert results == {item: item * item for item in range(12) if item != 5}


def test_an_exception_of_the_function_ends_the_run_and_spares_the_pool(
    pool: RayPool[Call, Any],
) -> None:
    def inverse(item: int) -> float:
        return 1 / item

    message = "failed while working on an item: ZeroDivisionError"
    with pytest.raises(RunError, match=message) as caught:
        do(pool, inverse, [1, 0, 2])
    assert type(caught.value.__cause__) is ZeroDivisionError
    with pytest.raises(RunError, match="cannot be sent to a worker"):
        do(pool, inverse, [threading.Lock()])
    assert do(pool, inverse, [2]) == [(2, 0.5)]


def test_an_exception_of_the_items_goes_through(pool: RayPool[Call, Any]) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise FileNotFoundError("clip.mp4")

    with pytest.raises(FileNotFoundError, match="clip.mp4"):
        do(pool, squares(), items())


def test_one_run_at_a_time(pool: RayPool[Call, Any]) -> None:
    running = pool.run([(squares(), 1), (squares(), 2)])
    next(running)
    with pytest.raises(RunError, match="busy with another run"):
        do(pool, squares(), [1])
    assert len(list(running)) == 1


def test_more_workers_than_ray_has_places_for(pool: RayPool[Call, Any]) -> None:
    do(pool, squares(), range(8))  # the pool has its 2 workers
    message = "a place for 0 of 1 workers in 3 s. Each needs 1 CPU.*there are 2 CPU.* 0 are free"
    with pytest.raises(RunError, match=message):
        RayPool(squares, workers=1, threads=1, start_timeout_s=3)


def test_no_second_ray_beside_the_callers(cluster: None) -> None:
    with pytest.raises(RunError, match="connected to a Ray already; it cannot go to 'auto' too"):
        RayPool(squares, workers=1, address="auto")


@pytest.fixture
def free(pool: RayPool[Call, Any]) -> None:
    """The module's pool is over: its CPUs are free for other pools."""
    pool.close()
    with pytest.raises(RunError, match="is closed"):
        next(pool.run([]))


def test_workers_that_die_at_every_item_end_the_run(free: None) -> None:
    def make() -> Callable[[int], None]:
        return lambda item: os.kill(os.getpid(), signal.SIGKILL)

    message = "Workers keep dying: 3 items in a row were given up after 1"
    with RayPool(make, workers=2, retries=0) as one, pytest.raises(RunError, match=message):
        list(one.run(range(10)))


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ModelLoadError("no-such-model: not found. Name a folder."), "no-such-model: not found."),
        (ValueError("odd"), "ValueError: odd"),
    ],
)
def test_a_function_that_cannot_be_made_is_one_clear_error(
    free: None, tmp_path: Path, raised: Exception, message: str
) -> None:
    def make() -> Callable[[int], int]:
        (tmp_path / str(os.getpid())).touch()
        raise raised

    with pytest.raises(RunError) as caught:
        RayPool(make, workers=2)
    assert "failed while loading: " + message in str(caught.value)
    assert type(caught.value.__cause__) is type(raised)
    assert len(list(tmp_path.iterdir())) <= 2  # not made again


def test_workers_that_die_while_they_load_end_the_run(free: None) -> None:
    def make() -> Callable[[int], int]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with pytest.raises(RunError, match="3 workers in a row died before they had loaded"):
        RayPool(make, workers=1)


# In a process of its own: a pool that starts and stops Ray itself.
OWN = """
import os, signal, sys, time
import ray
from eval.ray_pool import RayPool

handler = lambda *_: None
signal.signal(signal.SIGTERM, handler)

def make():
    def work(item):
        if item == 3 and {stop}:
            print("working", flush=True)
            time.sleep(60)
        return item + 1
    return work

start = time.perf_counter()
try:
    with RayPool(make, workers=2, threads=1, address={address}) as pool:
        print("seconds", time.perf_counter() - start, flush=True)
        if {stop}:
            print("working", flush=True)
        print(sorted(pool.run(range(6))), os.environ.get("RAY_USAGE_STATS_ENABLED"))
except KeyboardInterrupt:
    print("interrupted")
assert signal.getsignal(signal.SIGTERM) is handler
assert not ray.is_initialized()
"""


AGENTS = frozenset({"ray::DashboardAgent", "ray::RuntimeEnvAgent"})


def own(stop: bool, address: str | None = None) -> subprocess.Popen[str]:
    code = OWN.replace("{stop}", str(stop)).replace("{address}", repr(address))
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "RAY_USAGE_STATS_ENABLED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def alive(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after so many seconds."""
    return psutil.wait_procs(processes, timeout=seconds)[1]


def test_a_ray_of_its_own_ignores_the_environments() -> None:
    process = own(stop=False)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines()[1] == f"{[(item, item + 1) for item in range(6)]} 1"


def test_a_cluster_by_its_address_is_left_running(free: None) -> None:
    process = own(stop=False, address=ray.get_runtime_context().gcs_address)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines()[1] == f"{[(item, item + 1) for item in range(6)]} 1"
    assert ray.get(ray.remote(lambda: 1).remote(), timeout=20) == 1


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_when_the_driver_is_ended(way: signal.Signals) -> None:
    process = own(stop=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "working\n":
            break
    children = psutil.Process(process.pid).children(recursive=True)
    names = {child.pid: child.name() for child in children}
    assert set(names.values()) >= {"raylet", "gcs_server", *AGENTS}
    try:
        if way is signal.SIGINT:
            os.killpg(process.pid, way)  # what Ctrl-C in a terminal does
        else:
            process.send_signal(way)
        out, err = process.communicate(timeout=20)
        # Two idle agents of Ray try for a minute to report a SIGKILL; then they end by themselves.
        late = AGENTS if way is signal.SIGKILL else frozenset[str]()
        assert alive([child for child in children if names[child.pid] not in late], 20) == []
    finally:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    if way is signal.SIGINT:
        assert (out.strip(), err, process.returncode) == ("interrupted", "", 0)
