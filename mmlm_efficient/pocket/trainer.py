"""The training loop that all stages of pocket share: schedule, log, checkpoint, resume."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mmlm_efficient.errors import SettingsError

# raised when losses, data or shapes change: checkpoints of other versions are not gone on with
RECIPE_VERSION = 2

StepFunction = Callable[[int], dict[str, torch.Tensor]]
ProbeFunction = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Schedule:
    """How a stage is optimised.

    Attributes:
        steps: optimiser steps of the stage.
        learning_rate: peak of the schedule: linear warm-up, then cosine to 2 % of the peak.
        warmup_steps: length of the warm-up.
        weight_decay: AdamW's, on matrices only.
        clip_norm: gradients are scaled down to this norm.
        save_every, probe_every: steps between checkpoints and between accuracy probes.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    save_every: int = 200
    probe_every: int = 200

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def save_atomically(payload: Any, path: Path) -> None:
    """`torch.save` that never leaves half a file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(payload, partial)
    os.replace(partial, path)


def run_stage(
    name: str,
    modules: nn.ModuleDict,
    schedule: Schedule,
    step: StepFunction,
    out: Path,
    *,
    seed: int = 0,
    probe: ProbeFunction | None = None,
) -> None:
    """Optimise `modules` for the stage's steps, going on from the last checkpoint if there is one.

    A step must depend on its number alone (data and dropout are drawn from it), so that a run
    that was killed and resumed equals an undisturbed one.

    Args:
        name: of the stage; names its files `<name>.pt` and `<name>.jsonl` in `out`.
        modules: everything that is trained.
        schedule: see `Schedule`.
        step: from the step number to the losses; the entry "loss" is minimised.
        out: folder of checkpoints and logs.
        seed: of the run, only to tell runs apart.
        probe: held-out accuracies, called every `probe_every` steps and at the end.

    Raises:
        SettingsError: the checkpoint in `out` is of another seed or schedule.
    """
    checkpoint = out / f"{name}.pt"
    optimizer = _optimizer(modules, schedule)
    recipe = {"version": RECIPE_VERSION, "seed": seed, **asdict(schedule)}
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != recipe:
            raise SettingsError(
                f"{checkpoint} was made with {state['recipe']}, this run has {recipe}: "
                "use another folder, or the same settings"
            )
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["step"])
    out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        range(first, schedule.steps), desc=name, initial=first, total=schedule.steps, mininterval=5
    )
    started_s = time.perf_counter()
    for number in bar:
        rate = schedule.rate(number)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = step(number)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(modules.parameters(), schedule.clip_norm)
        optimizer.step()
        done = number + 1
        if number % 20 == 0:
            values = {key: round(float(value.detach()), 4) for key, value in losses.items()}
            bar.set_postfix(values, refresh=False)
            _log(out, name, {"step": number, "lr": rate, **values}, started_s)
        if probe is not None and (done % schedule.probe_every == 0 or done == schedule.steps):
            modules.eval()
            with torch.no_grad():
                accuracies = probe()
            modules.train()
            _log(out, name, {"step": done, "accuracy": accuracies}, started_s)
        if done % schedule.save_every == 0 or done == schedule.steps:
            payload = {
                "modules": modules.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
                "recipe": recipe,
            }
            save_atomically(payload, checkpoint)


def _optimizer(modules: nn.ModuleDict, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    trained = [p for p in modules.parameters() if p.requires_grad]
    groups: Iterable[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), foreach=True)


def _log(out: Path, name: str, entry: dict[str, Any], started_s: float) -> None:
    entry = {**entry, "elapsed_s": round(time.perf_counter() - started_s, 1)}
    with (out / f"{name}.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(entry) + "\n")
