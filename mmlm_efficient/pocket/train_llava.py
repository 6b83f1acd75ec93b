"""Stage 3 of pocket's training: the projector learns the decoder's language, then both go on.

The tower is frozen, so its outputs are computed once per scene and kept in a bank that is
renewed a little at every step. The projector is first fitted to the symbols of stage 2, then
projector and decoder are trained on questions about real features: all patches of a picture,
thinned-out patches at original or compact positions, and pooled frames of videos.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from mmlm_efficient.pocket.guidance import Probes, answer_loss
from mmlm_efficient.pocket.objects import NAMES
from mmlm_efficient.pocket.prompts import Batch, Encoder, Prefix, turn_accuracy
from mmlm_efficient.pocket.questions import Question, Thing, things_of
from mmlm_efficient.pocket.scenes import GRID, Scene, patch_labels, rng_of, scene, video
from mmlm_efficient.pocket.train_tower import labels_of, normalise, tower_hidden
from mmlm_efficient.pocket.train_words import (
    KIND_WEIGHTS,
    Symbols,
    draw_turns,
    draw_video_turns,
    image_prefix,
    name_table,
    pool_labels,
    pool_patches,
    video_prefix,
)
from mmlm_efficient.pocket.trainer import Schedule, run_stage

_PATCHES = GRID * GRID
_RENEWED_IMAGES, _RENEWED_VIDEOS = 8, 1  # per step


@dataclass(frozen=True)
class Seen:
    """One picture as the decoder's training needs it.

    Attributes:
        features: tower output without CLS, float32 [144, C].
        things: its objects.
        owner: object index of each patch [144], -1 = background.
        shown: kind of object of each patch [144], 64 = background.
        labels: targets of the projector fit (see `labels_of`).
    """

    features: torch.Tensor
    things: list[Thing]
    owner: np.ndarray
    shown: np.ndarray
    labels: dict[str, torch.Tensor]


@torch.no_grad()
def look(tower: CLIPVisionModel, scenes: list[Scene]) -> list[Seen]:
    """Run the tower over scenes."""
    hidden = tower_hidden(tower, normalise(np.stack([s.pixels for s in scenes])))[:, 1:]
    labels = labels_of(scenes, np.zeros((len(scenes), 2), np.int64))
    result = []
    for i, item in enumerate(scenes):
        owner, coverage = patch_labels(item)
        owner = np.where(coverage >= 0.25, owner, -1)
        kinds = np.array([*(NAMES.index(o.name) for o in item.objects), len(NAMES)])
        own = {key: value[i] for key, value in labels.items() if key != "present"}
        result.append(Seen(hidden[i].clone(), things_of(item), owner, kinds[owner], own))
    return result


class Bank:
    """A window over the endless row of training scenes, moved on by a few at each step.

    What it holds at a step depends on the step's number alone, so that a resumed run sees the
    same scenes.
    """

    def __init__(
        self,
        tower: CLIPVisionModel,
        images: int,
        videos: int,
        first_step: int = 0,
        split: str = "train",
    ) -> None:
        self.tower, self.split = tower, split
        self.images: dict[int, Seen] = {}
        self.videos: dict[int, tuple[list[Seen], list[int]]] = {}
        self._sizes = (images, videos)
        start_image, start_video = first_step * _RENEWED_IMAGES, first_step * _RENEWED_VIDEOS
        for start in tqdm(
            range(start_image, start_image + images, 32), desc="pictures", mininterval=5
        ):
            self._add_images(range(start, min(start + 32, start_image + images)))
        for number in tqdm(range(start_video, start_video + videos), desc="videos", mininterval=5):
            self._add_video(number)

    def advance(self, step: int) -> None:
        """Bring the window to a step's position."""
        images, videos = self._sizes
        wanted = step * _RENEWED_IMAGES
        fresh = [k for k in range(wanted, wanted + images) if k not in self.images]
        if fresh:
            self._add_images(fresh)
        for key in [k for k in self.images if k < wanted]:
            del self.images[key]
        wanted = step * _RENEWED_VIDEOS
        for number in range(wanted, wanted + videos):
            if number not in self.videos:
                self._add_video(number)
        for key in [k for k in self.videos if k < wanted]:
            del self.videos[key]

    def draw_images(self, rng: np.random.Generator, count: int) -> list[Seen]:
        """Random pictures of the window."""
        first = min(self.images)
        return [self.images[first + int(k)] for k in rng.integers(0, len(self.images), count)]

    def draw_videos(
        self, rng: np.random.Generator, count: int
    ) -> list[tuple[list[Seen], list[int]]]:
        """Random videos of the window."""
        first = min(self.videos)
        return [self.videos[first + int(k)] for k in rng.integers(0, len(self.videos), count)]

    def _add_images(self, numbers: range | list[int]) -> None:
        for number, seen in zip(
            numbers, look(self.tower, [scene(self.split, k) for k in numbers]), strict=True
        ):
            self.images[number] = seen

    def _add_video(self, number: int) -> None:
        item = video(self.split, number)
        self.videos[number] = (look(self.tower, list(item.frames)), list(item.times_s))


def fit_projector(
    model: LlavaForConditionalGeneration,
    symbols: Symbols,
    encoder: Encoder,
    bank: Bank,
    out: Path,
    *,
    steps: int,
    seed: int,
) -> None:
    """Make projected patches equal to the symbols of what they show (least squares)."""
    projector = model.model.multi_modal_projector
    seen = list(bank.images.values())
    features = torch.stack([s.features for s in seen])
    labels = {key: torch.stack([s.labels[key] for s in seen]) for key in seen[0].labels}
    labels["patch"] = torch.arange(_PATCHES).expand(len(seen), -1)
    table = name_table(model, encoder).detach()

    def step(number: int) -> dict[str, torch.Tensor]:
        rows = torch.from_numpy(rng_of("train", number, 6, seed).integers(0, len(seen), 64))
        own = {key: value[rows] for key, value in labels.items()}
        sure = own["name"] >= 0
        thing = sure & (own["name"] < len(NAMES))
        clean = {key: value.clamp(min=0) for key, value in own.items()}
        with torch.no_grad():
            target = symbols(clean, table)
        error = (projector(features[rows]) - target).square().sum(-1)
        loss = error[thing].mean() + error[sure & ~thing].mean()
        return {"loss": loss, "things": error[thing].mean()}

    modules = nn.ModuleDict({"projector": projector})
    run_stage("projector", modules, Schedule(steps, 3e-3, save_every=10**6), step, out, seed=seed)


def image_step(
    encoder: Encoder,
    bank: Bank,
    rng: np.random.Generator,
    size: int,
    turns_each: int,
    *,
    full: bool,
) -> tuple[Batch, torch.Tensor, list[list[Question]]]:
    """Sequences over pictures of the bank, their tower features [total, C], the questions."""
    prefixes, turns, features = [], [], []
    keep_empty = 1.0 if full else rng.uniform(0.0, 0.6)
    for seen in bank.draw_images(rng, size):
        kept = np.arange(_PATCHES)
        if not full:
            kept = thin_out(seen, rng, keep_empty)
        prefixes.append(_prefix_of(seen, kept, encoder, rng))
        features.append(seen.features[torch.from_numpy(kept)])
        turns.append(draw_turns(seen.things, rng, turns_each, KIND_WEIGHTS))
    return encoder.batch(prefixes, turns), torch.cat(features), turns


def _prefix_of(seen: Seen, kept: np.ndarray, encoder: Encoder, rng: np.random.Generator) -> Prefix:
    return image_prefix(kept, seen.shown[kept], seen.owner[kept], seen.things, encoder, rng)


def thin_out(seen: Seen, rng: np.random.Generator, keep_empty: float) -> np.ndarray:
    """Patches that stay (ascending): some of each object's, at least one; some background."""
    draw = rng.random(_PATCHES)
    stays = np.where(seen.owner >= 0, draw < rng.uniform(0.3, 1.0), draw < keep_empty)
    for k in range(len(seen.things)):
        mine = np.flatnonzero(seen.owner == k)
        if len(mine):
            stays[mine[int(rng.integers(len(mine)))]] = True
    return np.flatnonzero(stays)


def video_step(
    encoder: Encoder, bank: Bank, rng: np.random.Generator, size: int, *, full: bool
) -> tuple[Batch, torch.Tensor, torch.Tensor, list[list[Question]]]:
    """Sequences over videos: features of all frames [F, 144, C], kept pooled tokens, questions."""
    prefixes, turns, chosen = [], [], []
    features: list[torch.Tensor] = []
    keep_empty = 1.0 if full else rng.uniform(0.0, 0.6)
    for frames, times_s in bank.draw_videos(rng, size):
        kept, shown = [], []
        seen_at: dict[str, list[int]] = {}
        for frame, time_s in zip(frames, times_s, strict=True):
            for thing in frame.things:
                seen_at.setdefault(thing.name, []).append(time_s)
            kinds = pool_labels(frame.shown)
            stay = np.flatnonzero((kinds < len(NAMES)) | (rng.random(len(kinds)) < keep_empty))
            chosen.append(stay + len(features) * len(kinds))
            kept.append(stay)
            shown.append(kinds[stay])
            features.append(frame.features)
        prefixes.append(video_prefix(kept, shown, times_s, encoder))
        turns.append(draw_video_turns(seen_at, rng, 9))
    return (
        encoder.batch(prefixes, turns),
        torch.stack(features),
        torch.from_numpy(np.concatenate(chosen)),
        turns,
    )


def train(
    model: LlavaForConditionalGeneration,
    symbols: Symbols,
    encoder: Encoder,
    tower: CLIPVisionModel,
    out: Path,
    *,
    seed: int = 0,
    steps: int = 3500,
    projector_steps: int = 500,
    images: int = 4000,
    videos: int = 300,
    learning_rate: float = 1.2e-3,
    size: int = 16,
) -> None:
    """Train `model` in place, in `out` (resumable); its tower becomes `tower`."""
    model.model.vision_tower.load_state_dict(tower.state_dict())
    tower.requires_grad_(False)
    checkpoint = out / "llava.pt"
    done = int(torch.load(checkpoint, weights_only=True)["step"]) if checkpoint.exists() else 0
    bank = Bank(tower, images, videos, done)
    unseen = Bank(tower, min(images, 256), min(videos, 32), split="calibration")
    fit_projector(model, symbols, encoder, bank, out, steps=projector_steps, seed=seed)
    projector = model.model.multi_modal_projector
    modules = nn.ModuleDict(
        {"text": model.model.language_model, "head": model.lm_head, "projector": projector}
    )
    modules["probes"] = probes = Probes()

    def forward(
        bank: Bank, rng: np.random.Generator, number: int
    ) -> tuple[Batch, dict[str, torch.Tensor], torch.Tensor, list[list[Question]]]:
        """Every second step shows all patches, every fifth videos."""
        full = number % 2 == 0
        if number % 5 == 4:
            batch, features, chosen, turns = video_step(encoder, bank, rng, size // 2, full=full)
            visual = pool_patches(projector(features)).flatten(0, 1)[chosen]
        else:
            batch, features, turns = image_step(
                encoder, bank, rng, size if full else 2 * size, 10, full=full
            )
            visual = projector(features)
        return batch, *answer_loss(model, batch, visual, probes), turns

    def step(number: int) -> dict[str, torch.Tensor]:
        bank.advance(number)
        _, losses, _, _ = forward(bank, rng_of("train", number, 7, seed), number)
        return losses

    def probe() -> dict[str, float]:
        found: dict[str, list[bool]] = {}
        for number in (0, 10, 20, 4, 14):
            rng = rng_of("calibration", number, 8)
            batch, _, said, turns = forward(unseen, rng, number)
            for kind, values in turn_accuracy(batch, said, turns, encoder).items():
                found.setdefault(kind, []).extend(values)
        return {kind: round(sum(v) / len(v), 3) for kind, v in sorted(found.items())}

    schedule = Schedule(steps, learning_rate, warmup_steps=50, probe_every=100, save_every=100)
    run_stage("llava", modules, schedule, step, out, seed=seed, probe=probe)
    model.eval()
