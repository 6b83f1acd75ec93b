"""`mmlm train pocket`: all stages in order, then a model folder like the shipped one."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration

from mmlm_efficient.errors import SettingsError, require_extra
from mmlm_efficient.pocket import train_llava, train_tower, train_words
from mmlm_efficient.pocket.vocabulary import build_processor

log = logging.getLogger("mmlm_efficient.pocket")

WEIGHTS = Path(__file__).parent / "weights"
MAX_WEIGHTS_BYTES = 25 * 2**20


def train_pocket(out: Path, *, seed: int = 0, threads: int = 2, scale: float = 1.0) -> Path:
    """Train pocket from nothing; a killed run goes on where it was when called again.

    Args:
        out: folder for checkpoints, logs (`<stage>.jsonl`) and the result (`weights/`).
        seed: of initialisation and data; the same seed gives the same run on the same machine
            with the same number of threads.
        threads: CPU threads.
        scale: multiplies the steps of every stage; below 1 for a quick trial.

    Returns:
        The folder with the finished model.

    Raises:
        SettingsError: scale or threads out of range, or `out` holds a run of another recipe.
        MissingExtraError: matplotlib is not installed.
    """
    if not 0 < scale <= 10:
        raise SettingsError(f"scale={scale} is outside (0, 10]; 1 is the shipped recipe")
    if threads < 1:
        raise SettingsError(f"threads={threads} must be 1 or more")
    require_extra("matplotlib", "train")  # for the curves: now, not after hours
    torch.set_num_threads(threads)

    def steps(count: int) -> int:
        return max(2, round(count * scale))

    tower = train_tower.train(out, seed=seed, cutout_steps=steps(3000), whole_steps=steps(1500))
    model, symbols, encoder = train_words.train(
        out, seed=seed, steps=steps(1500), early_steps=steps(150)
    )
    train_llava.train(
        model,
        symbols,
        encoder,
        tower,
        out,
        seed=seed,
        steps=steps(3500),
        projector_steps=steps(500),
        images=max(64, steps(4000)),
        videos=max(8, steps(300)),
    )
    folder = export(model, out / "weights")
    plot_curves(out, out / "curves.png")
    return folder


def export(model: LlavaForConditionalGeneration, folder: Path) -> Path:
    """Write a Hugging Face folder: bfloat16 weights, configuration, processor, chat template.

    The folder appears whole or not at all.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    config = model.model.language_model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        max_new_tokens=64,
    )
    model.set_attn_implementation("sdpa")
    model.bfloat16().save_pretrained(partial)
    build_processor().save_pretrained(partial)
    written = sum(f.stat().st_size for f in partial.glob("*.safetensors"))
    if written > MAX_WEIGHTS_BYTES:
        raise SettingsError(f"weights take {written} bytes; the limit is {MAX_WEIGHTS_BYTES}")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    log.info("wrote %s (%.1f MiB of weights)", folder, written / 2**20)
    return folder


def write_card(folder: Path, images: Mapping[str, Any], videos: Mapping[str, Any]) -> None:
    """Write the model card (README.md of the folder) with measured accuracies.

    Args:
        folder: the model's folder.
        images: what `benchmarks/pocket_accuracy.py` writes; its unpruned row is shown.
        videos: what `benchmarks/pocket_card.py` writes: videos, and count, accuracy and interval
            of each kind.
    """
    text = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    row = next(r for r in images["rows"] if r["method"] == "none")
    entries = [*row["kinds"].items(), ("all pictures", row["overall"]), *videos["kinds"].items()]
    lines = ["| kind | answers | right | 95 % interval |", "|---|---|---|---|"]
    for kind, entry in entries:
        low, high = entry["interval"]
        lines.append(
            f"| {kind} | {entry['count']} | {entry['accuracy']:.1%} | {low:.1%} to {high:.1%} |"
        )
    text = text.replace("<!-- accuracy -->", "\n".join(lines))
    text = text.replace("<!-- scenes -->", f"{images['scenes']:,}")
    text = text.replace("<!-- videos -->", f"{videos['videos']:,}")
    partial = folder / "README.md.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / "README.md")


def curves(out: Path) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """Held-out accuracies per kind logged while training: stage -> [(step, kind -> accuracy)]."""
    stages: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for name in ("tower_cutouts", "tower_whole", "words", "llava"):
        path = out / f"{name}.jsonl"
        if not path.exists():
            continue
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        points = {e["step"]: e["accuracy"] for e in entries if "accuracy" in e}
        if points:
            stages[name] = sorted(points.items())
    return stages


def plot_curves(out: Path, path: Path) -> None:
    """Draw `curves` as a PNG, one panel per stage.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    stages = curves(out)
    figure = Figure(figsize=(5 * max(1, len(stages)), 4), layout="constrained")
    for number, (name, points) in enumerate(stages.items(), start=1):
        axes = figure.add_subplot(1, len(stages), number)
        for kind in points[-1][1]:
            line = [(step, found[kind]) for step, found in points if kind in found]
            axes.plot(*zip(*line, strict=True), label=kind)
        axes.set(title=name, xlabel="step", ylabel="held-out accuracy", ylim=(0, 1.02))
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
