"""The machine in words, the versions in use, and memory high-water marks, for result files."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
_PACKAGES = ("mmlm-efficient", "torch", "transformers", "tokenizers", "numpy")


def provenance(device: torch.device) -> dict[str, Any]:
    """Date, versions and hardware, for the head of every result file."""
    return {
        "date": now_text(),
        "versions": versions(),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
    }


def now_text() -> str:
    """Date and time in words, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what is computed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine: processor, cores, memory, and the accelerator if one is used."""
    described: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        described["cuda"] = torch.version.cuda
    return described


def machine_line(result: Mapping[str, Any]) -> str:
    """Hardware, threads and date of a result in one line."""
    machine = result["hardware"]
    where = machine.get("gpu") or f"{machine['cpu']} ({machine['cpu_capability']})"
    threads = "" if "gpu" in machine else f", {result['threads']} thread(s)"
    return f"{where}{threads}, torch {result['versions']['torch']}, {result['date'][:10]}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


class PeakMemory:
    """The high-water mark of memory while some work runs, in bytes.

    On CUDA what torch's allocator gave out (weights included), elsewhere what the operating
    system saw of the whole process.

    Args:
        device: where the work runs.

    Example:
        >>> peak = PeakMemory(torch.device("cpu"))
        >>> peak.reset()
        >>> peak.read() is None or peak.read() > 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._works = True

    def reset(self) -> None:
        """Start again from what is held now."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._works = _reset_high_water_mark()

    def read(self) -> int | None:
        """The most since `reset`; None where the system cannot reset its mark."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return _status_bytes("VmHWM") if self._works else None


def peak_resident_bytes(call: Callable[[], Any]) -> int | None:
    """Most resident memory of this process during a call, beyond what it had before.

    What the operating system saw, work space of libraries included; it depends on what the
    process did before, so give every case a fresh process. None where Linux's high-water mark
    cannot be reset.
    """
    gc.collect()
    if not _reset_high_water_mark():
        return None
    before = _status_bytes("VmRSS")
    call()
    peak = _status_bytes("VmHWM")
    return None if peak is None or before is None else peak - before


def _reset_high_water_mark() -> bool:
    """Whether Linux could set VmHWM of this process back to what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    before, mark = _status_bytes("VmRSS"), _status_bytes("VmHWM")
    return before is not None and mark is not None and mark <= before + MIB


def _status_bytes(field: str) -> int | None:
    """A memory figure of this process, bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else None
