"""Stage 1 of pocket's training: the vision tower alone, told what every patch shows.

Patches learn which object covers them and where its centre is; CLS learns which objects are in
the picture, so that its attention row means something (pruning methods read it).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionModel

from mmlm_efficient.pocket.architecture import TOWER_WIDTH, vision_config
from mmlm_efficient.pocket.objects import NAMES
from mmlm_efficient.pocket.scenes import (
    BIN_PX,
    BINS,
    GRID,
    PATCH_PX,
    Scene,
    cutout,
    patch_labels,
    rng_of,
    scene,
)
from mmlm_efficient.pocket.trainer import Schedule, StepFunction, run_stage

BACKGROUND = len(NAMES)
_IGNORED = -100
_LOW_COVERAGE, _HIGH_COVERAGE = 0.08, 0.25  # between them a patch is neither object nor background
CUTOUT_GRID = GRID // 2


class TowerHeads(nn.Module):
    """Linear read-outs that exist only while training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(TOWER_WIDTH)
        self.patch = nn.Linear(TOWER_WIDTH, len(NAMES) + 1 + 2 * BINS + 1)
        self.cls = nn.Linear(TOWER_WIDTH, len(NAMES))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """hidden [B, 1 + N, C] -> names [B, N, 65], x [B, N, 32], y, centre [B, N], cls [B, 64]."""
        hidden = self.norm(hidden)
        out = self.patch(hidden[:, 1:])
        names, x, y, centre = out.split([len(NAMES) + 1, BINS, BINS, 1], dim=-1)
        return names, x, y, centre.squeeze(-1), self.cls(hidden[:, 0])


def normalise(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in -1..1, as the image processor does it."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def tower_hidden(
    tower: CLIPVisionModel, pixels: torch.Tensor, corners: torch.Tensor | None = None
) -> torch.Tensor:
    """Last hidden state, CLS first, of whole pictures or of cut-outs placed on the grid.

    Args:
        pixels: float32 [B, 3, H, W].
        corners: int64 [B, 2], grid row and column of each cut-out's first patch; None = (0, 0).
    """
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels)
    side = patches.shape[-1]
    patches = patches.flatten(2).transpose(1, 2)
    table = embeddings.position_embedding.weight
    rows = torch.arange(side)[None, :, None]
    columns = torch.arange(side)[None, None, :]
    if corners is None:
        corners = torch.zeros(len(pixels), 2, dtype=torch.long)
    index = (rows + corners[:, :1, None]) * GRID + columns + corners[:, 1:, None]
    patches = patches + table[1 + index.flatten(1)]
    cls = (embeddings.class_embedding + table[0]).expand(len(pixels), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([cls, patches], dim=1))
    last: torch.Tensor = tower.encoder(inputs_embeds=hidden).last_hidden_state
    return last


def labels_of(scenes: list[Scene], corners: np.ndarray) -> dict[str, torch.Tensor]:
    """Targets of a batch: name, x, y [B, N] (ignored = -100), middle [B, N], present [B, 64]."""
    count, patches = len(scenes), (scenes[0].pixels.shape[0] // PATCH_PX) ** 2
    names = np.full((count, patches), BACKGROUND)
    x, y = np.full((2, count, patches), _IGNORED)
    centre = np.zeros((count, patches), np.float32)
    present = np.zeros((count, len(NAMES)), np.float32)
    side = scenes[0].pixels.shape[0] // PATCH_PX
    for i, item in enumerate(scenes):
        owner, coverage = patch_labels(item)
        unsure = (coverage > _LOW_COVERAGE) & (coverage < _HIGH_COVERAGE)
        names[i, unsure] = _IGNORED
        for k, thing in enumerate(item.objects):
            mine = (owner == k) & (coverage >= _HIGH_COVERAGE)
            names[i, mine] = NAMES.index(thing.name)
            cx, cy = thing.center_px
            x[i, mine] = int((cx + corners[i, 1] * PATCH_PX) / BIN_PX)
            y[i, mine] = int((cy + corners[i, 0] * PATCH_PX) / BIN_PX)
            centre[i, int(cy) // PATCH_PX * side + int(cx) // PATCH_PX] = 1
            present[i, NAMES.index(thing.name)] = 1
    arrays = {"name": names, "x": x, "y": y, "middle": centre, "present": present}
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}


def _losses(
    outputs: tuple[torch.Tensor, ...], target: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    names, x, y, centre, cls = outputs
    per_patch = functional.cross_entropy(
        names.flatten(0, 1), target["name"].flatten(), ignore_index=_IGNORED, reduction="none"
    )
    flat = target["name"].flatten()
    objects, empty = (flat >= 0) & (flat < BACKGROUND), flat == BACKGROUND
    name = per_patch[objects].mean() + per_patch[empty].mean()
    place = functional.cross_entropy(x.flatten(0, 1), target["x"].flatten(), ignore_index=_IGNORED)
    place = place + functional.cross_entropy(
        y.flatten(0, 1), target["y"].flatten(), ignore_index=_IGNORED
    )
    middle = functional.binary_cross_entropy_with_logits(centre, target["middle"]) * 10
    seen = functional.binary_cross_entropy_with_logits(cls, target["present"]) * 10
    loss = name + place + 0.3 * middle + 0.5 * seen
    return {"loss": loss, "name": name, "place": place, "centre": middle, "cls": seen}


def batch(
    step: int, size: int, *, whole: bool
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Pixels, corners and targets of a training step; a function of the step number alone."""
    compose = scene if whole else cutout
    items = [compose("train", step * size + k) for k in range(size)]
    free = 0 if whole else GRID - CUTOUT_GRID
    corners = rng_of("train", step, 3).integers(0, free + 1, size=(size, 2))
    pixels = normalise(np.stack([item.pixels for item in items]))
    return pixels, torch.from_numpy(corners), labels_of(items, corners)


def accuracy(tower: CLIPVisionModel, heads: TowerHeads, count: int = 128) -> dict[str, float]:
    """Read-out accuracy on scenes that training does not learn from."""
    items = [scene("calibration", k) for k in range(count)]
    target = labels_of(items, np.zeros((count, 2), np.int64))
    names, x, y, _, cls = heads(tower_hidden(tower, normalise(np.stack([s.pixels for s in items]))))
    guess, truth = names.argmax(-1), target["name"]
    objects, empty = (truth >= 0) & (truth < BACKGROUND), truth == BACKGROUND
    near_x = (x.argmax(-1) - target["x"]).abs() <= 1
    near_y = (y.argmax(-1) - target["y"]).abs() <= 1
    said, present = cls > 0, target["present"] > 0
    return {
        "object_patches": float((guess == truth)[objects].float().mean()),
        "background": float((guess == truth)[empty].float().mean()),
        "position": float((near_x & near_y)[objects].float().mean()),
        "cls_recall": float((said & present).sum() / present.sum()),
        "cls_precision": float((said & present).sum() / said.sum().clamp(min=1)),
    }


def train(
    out: Path, *, seed: int = 0, cutout_steps: int = 3000, whole_steps: int = 1500
) -> CLIPVisionModel:
    """Train the tower in `out` (resumable): cut-outs first, then whole pictures.

    Returns:
        The tower in float32, in evaluation mode.
    """
    torch.manual_seed(seed)
    config = vision_config()
    config._attn_implementation = "eager"  # SDPA's backward is slower on CPUs
    tower, heads = CLIPVisionModel(config), TowerHeads()
    modules = nn.ModuleDict({"tower": tower, "heads": heads})

    def step_of(whole: bool, size: int) -> StepFunction:
        def step(number: int) -> dict[str, torch.Tensor]:
            pixels, corners, target = batch(number + seed * 10**7, size, whole=whole)
            return _losses(heads(tower_hidden(tower, pixels, corners)), target)

        return step

    def probe() -> dict[str, float]:
        return accuracy(tower, heads)

    stages = (
        ("tower_cutouts", Schedule(cutout_steps, 1.5e-3), step_of(False, 64)),
        ("tower_whole", Schedule(whole_steps, 7e-4), step_of(True, 24)),
    )
    for name, schedule, step in stages:
        run_stage(name, modules, schedule, step, out, seed=seed, probe=probe)
    tower.eval()
    return tower
