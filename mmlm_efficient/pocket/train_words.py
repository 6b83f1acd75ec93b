"""Stage 2 of pocket's training: the decoder learns to look things up among symbolic patches.

No picture is drawn. Each patch is the sum of what it shows: the word embedding of the object's
name, a vector for the object's centre, a vector for its own place, noise. That makes the visual
tokens speak the decoder's language from the start; stage 3 teaches the projector to speak it.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from mmlm_efficient.pocket.architecture import TEXT_WIDTH, build_model, text_config
from mmlm_efficient.pocket.guidance import Probes, answer_loss
from mmlm_efficient.pocket.objects import NAMES
from mmlm_efficient.pocket.prompts import VISUAL, Batch, Encoder, Prefix, turn_accuracy
from mmlm_efficient.pocket.questions import VIDEO_KINDS, Question, Thing, ask, ask_video
from mmlm_efficient.pocket.scenes import (
    BINS,
    GRID,
    IMAGE_PX,
    PATCH_PX,
    arrange,
    draw_names,
    draw_timeline,
    rng_of,
)
from mmlm_efficient.pocket.trainer import Schedule, run_stage
from mmlm_efficient.pocket.vocabulary import BOS, EOS, IMAGE, PAD, build_tokenizer

BACKGROUND = len(NAMES)
_FINE = 4  # sub-samples per patch side when an object's disc is laid over the grid
# how often each kind is asked: most what is learnt last
KIND_WEIGHTS = {
    "is_there": 0.8,
    "how_many": 2.2,
    "where_is": 1.8,
    "what_is_at": 1.2,
    "extreme": 1.4,
    "relation": 1.5,
    "list": 2.6,
}
_FIRST_KINDS = {"is_there": 2.0, "where_is": 2.0, "what_is_at": 1.5, "how_many": 0.5}


class Symbols(nn.Module):
    """What a patch says, as a vector in the decoder's embedding space."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(_smooth_table(BINS, 1) + _ramp(5))
        self.y = nn.Parameter(_smooth_table(BINS, 2) + _ramp(6))
        self.row = nn.Parameter(_smooth_table(GRID, 3) * 0.5)
        self.column = nn.Parameter(_smooth_table(GRID, 4) * 0.5)
        self.middle = nn.Parameter(torch.randn(TEXT_WIDTH) / TEXT_WIDTH**0.5)
        self.empty = nn.Parameter(torch.randn(TEXT_WIDTH) / TEXT_WIDTH**0.5)

    def forward(self, labels: dict[str, torch.Tensor], name_table: torch.Tensor) -> torch.Tensor:
        """Patch labels [...] -> vectors [..., C].

        Args:
            labels: name (64 = background), x, y (bins; unread for background), middle (0 or 1),
                patch (raster index).
            name_table: word embeddings of the names [64, C].
        """
        table = torch.cat([name_table, self.empty[None]])
        thing = (labels["name"] < BACKGROUND)[..., None].float()
        place = self.x[labels["x"]] + self.y[labels["y"]]
        own = self.row[labels["patch"] // GRID] + self.column[labels["patch"] % GRID]
        middle = labels["middle"][..., None] * self.middle
        total: torch.Tensor = table[labels["name"]] + thing * place + middle + own
        return total


def _smooth_table(count: int, seed: int) -> torch.Tensor:
    """Random vectors [count, C] of about unit length, alike for neighbouring rows."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.rand(TEXT_WIDTH, generator=generator) * 8
    phase = torch.rand(TEXT_WIDTH, generator=generator) * 6.2832
    place = torch.arange(count)[:, None] / count
    return torch.cos(place * frequency * 3.1416 + phase) * math.sqrt(2 / TEXT_WIDTH)


def _ramp(seed: int) -> torch.Tensor:
    """A straight line of vectors [BINS, C]: comparing two places becomes a subtraction."""
    direction = torch.randn(TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))
    direction = direction / direction.norm()
    return torch.outer(torch.linspace(-1.2, 1.2, BINS), direction)


def layout(names: list[str], rng: np.random.Generator) -> tuple[list[Thing], dict[str, np.ndarray]]:
    """Objects at random places and the labels of all patches, without drawing anything.

    Returns:
        things: name, centre and size of each object.
        patches: name, x, y, middle [GRID * GRID] and owner (-1 = background).
    """
    things = []
    fine = GRID * _FINE
    ticks = (np.arange(fine) + 0.5) * (PATCH_PX / _FINE)
    cover = np.zeros((len(names) + 1, GRID * GRID), np.float32)
    for k, (name, left, top, size) in enumerate(arrange(names, IMAGE_PX, rng)):
        thing = Thing(name, left + size / 2, top + size / 2, size)
        things.append(thing)
        gap = np.hypot.outer(ticks - thing.y_px, ticks - thing.x_px) < 0.42 * size
        cover[k] = gap.reshape(GRID, _FINE, GRID, _FINE).mean((1, 3)).ravel()
    owner = np.where(cover.max(0) >= 0.2, cover.argmax(0), -1)
    patches = {key: np.zeros(GRID * GRID, np.int64) for key in ("x", "y")}
    patches |= {"name": np.full(GRID * GRID, BACKGROUND), "owner": owner}
    patches["middle"] = np.zeros(GRID * GRID, np.float32)
    for k, thing in enumerate(things):
        mine = owner == k
        patches["name"][mine] = NAMES.index(thing.name)
        patches["x"][mine], patches["y"][mine] = thing.bins
        patches["middle"][int(thing.y_px) // PATCH_PX * GRID + int(thing.x_px) // PATCH_PX] = 1
    return things, patches


def thin_out(owner: np.ndarray, rng: np.random.Generator, *, middle: np.ndarray) -> np.ndarray:
    """Patches that stay (ascending): every object keeps its middle, the rest is thinned."""
    keep_object, keep_empty = rng.uniform(0.3, 1.0), rng.uniform(0.0, 0.25)
    draw = rng.random(len(owner))
    kept = np.where(owner >= 0, draw < keep_object, draw < keep_empty) | (middle > 0)
    return np.flatnonzero(kept)


def image_prefix(
    kept: np.ndarray,
    shown: np.ndarray,
    owner: np.ndarray,
    things: list[Thing],
    encoder: Encoder,
    rng: np.random.Generator,
) -> Prefix:
    """Prefix of one picture, at original or at compact positions by chance.

    Args:
        kept: raster indices of the patches that stay.
        shown, owner: kind and index of the object that each of them shows.
    """
    original = rng.random() < 0.5
    positions = (2 + kept).tolist() if original else list(range(2, 2 + len(kept)))
    ids = [encoder.bos, encoder.user, *[VISUAL] * len(kept)]
    length = GRID * GRID if original else len(kept)
    return Prefix(
        ids, [0, 1, *positions], 2 + length, shown, things=things, patches=kept, owner=owner
    )


def draw_turns(
    things: list[Thing], rng: np.random.Generator, count: int, weights: dict[str, float]
) -> list[Question]:
    """Questions about one picture, kinds drawn by weight."""
    kinds = list(weights)
    share = np.array([weights[kind] for kind in kinds])
    drawn = rng.choice(len(kinds), size=count, p=share / share.sum())
    asked = (ask(kinds[k], things, rng) for k in drawn)
    return [question for question in asked if question is not None]


def image_batch(
    encoder: Encoder, seed: int, size: int, *, early: bool
) -> tuple[Batch, dict[str, torch.Tensor], list[list[Question]]]:
    """A step's pictures: sequences, labels of the kept patches [total], questions."""
    prefixes, turns, columns = [], [], []
    for k in range(size):
        rng = rng_of("train", seed * size + k, 4)
        names = draw_names(rng, int(rng.integers(1, 4)) if early else None)
        things, patches = layout(names, rng)
        kept = thin_out(patches["owner"], rng, middle=patches["middle"])
        own = {key: value[kept] for key, value in patches.items()} | {"patch": kept}
        slip = (rng.random(len(kept)) < 0.02) & (own["owner"] >= 0)
        own["name"] = np.where(slip, rng.integers(0, BACKGROUND, len(kept)), own["name"])
        columns.append(own)
        prefixes.append(image_prefix(kept, own["name"], own["owner"], things, encoder, rng))
        turns.append(draw_turns(things, rng, 8, _FIRST_KINDS if early else KIND_WEIGHTS))
    labels = {
        key: torch.from_numpy(np.concatenate([c[key] for c in columns])) for key in columns[0]
    }
    return encoder.batch(prefixes, turns), labels, turns


def video_prefix(
    kept: list[np.ndarray], shown: list[np.ndarray], times_s: list[int], encoder: Encoder
) -> Prefix:
    """Prefix of several frames, each preceded by its time as text ("3 s")."""
    ids, clocks = [encoder.bos, encoder.user], []
    for frame, time_s in zip(kept, times_s, strict=True):
        clocks += [len(ids)] * len(frame)
        ids += [*encoder.text(f"{time_s} s"), *[VISUAL] * len(frame)]
    return Prefix(ids, range(len(ids)), len(ids), np.concatenate(shown), clocks)


def draw_video_turns(
    seen: dict[str, list[int]], rng: np.random.Generator, count: int
) -> list[Question]:
    """Questions about one video, times twice as often as the rest."""
    kinds = (*VIDEO_KINDS, "video_time")
    asked = (ask_video(kinds[k % len(kinds)], seen, rng) for k in range(count))
    return [question for question in asked if question is not None]


def pool_patches(vectors: torch.Tensor) -> torch.Tensor:
    """Average 2 x 2 neighbours: [F, 144, C] -> [F, 36, C]."""
    frames, _, width = vectors.shape
    half = GRID // 2
    return (
        vectors.reshape(frames, half, 2, half, 2, width)
        .mean((2, 4))
        .reshape(frames, half * half, width)
    )


def video_batch(
    encoder: Encoder, seed: int, size: int
) -> tuple[Batch, dict[str, torch.Tensor], torch.Tensor, list[list[Question]]]:
    """A step's videos: sequences, labels of all patches [F, 144], kept pooled tokens, questions.

    The third value indexes the pooled tokens of all frames, flattened [F * 36].
    """
    prefixes, turns, chosen = [], [], []
    columns: list[dict[str, np.ndarray]] = []
    for k in range(size):
        rng = rng_of("train", seed * size + k, 5)
        names, spans, times_s = draw_timeline(rng)
        seen: dict[str, list[int]] = {}
        kept, shown_kinds = [], []
        for number, time_s in enumerate(times_s):
            shown = [n for n, (a, b) in zip(names, spans, strict=True) if a <= number < b]
            things, patches = layout(shown, rng)
            for thing in things:
                seen.setdefault(thing.name, []).append(time_s)
            kinds = pool_labels(patches["name"])
            stay = np.flatnonzero((kinds < BACKGROUND) | (rng.random(len(kinds)) < 0.2))
            chosen.append(stay + len(columns) * len(kinds))
            kept.append(stay)
            shown_kinds.append(kinds[stay])
            columns.append(patches | {"patch": np.arange(GRID * GRID)})
        prefixes.append(video_prefix(kept, shown_kinds, times_s, encoder))
        turns.append(draw_video_turns(seen, rng, 6))
    labels = {key: torch.from_numpy(np.stack([c[key] for c in columns])) for key in columns[0]}
    return (
        encoder.batch(prefixes, turns),
        labels,
        torch.from_numpy(np.concatenate(chosen)),
        turns,
    )


def pool_labels(names: np.ndarray) -> np.ndarray:
    """Kind that each of the 36 pooled tokens shows: of its 2 x 2 patches [144] the first object."""
    half = GRID // 2
    kinds: np.ndarray = names.reshape(half, 2, half, 2).min((1, 3)).ravel()
    return kinds


def build(seed: int) -> tuple[LlavaForConditionalGeneration, Encoder]:
    """Fresh model and encoder; attention starts out looking for tokens that are alike."""
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    config = text_config(len(tokenizer), bos=ids[BOS], eos=ids[EOS], pad=ids[PAD])
    model = build_model(config, ids[IMAGE], seed)
    model.set_attn_implementation("eager")  # SDPA's causal backward is slower on CPUs
    with torch.no_grad():
        nn.init.normal_(model.model.language_model.embed_tokens.weight, std=TEXT_WIDTH**-0.5)
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            nn.init.normal_(attention.q_proj.weight, std=0.035)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
    return model, Encoder(tokenizer)


def name_table(model: LlavaForConditionalGeneration, encoder: Encoder) -> torch.Tensor:
    """Word embeddings of the object names [64, C]."""
    table: torch.Tensor = model.model.language_model.embed_tokens.weight
    return table[[encoder.token(name) for name in NAMES]]


def train(
    out: Path, *, seed: int = 0, steps: int = 1500, early_steps: int = 150, size: int = 32
) -> tuple[LlavaForConditionalGeneration, Symbols, Encoder]:
    """Train decoder and symbols in `out` (resumable)."""
    model, encoder = build(seed)
    symbols = Symbols()
    modules = nn.ModuleDict(
        {"text": model.model.language_model, "head": model.lm_head, "symbols": symbols}
    )
    modules["probes"] = probes = Probes()

    def vectors(labels: dict[str, torch.Tensor], noise_seed: int) -> torch.Tensor:
        """Noisy symbols of patches."""
        clean = symbols(labels, name_table(model, encoder))
        generator = torch.Generator().manual_seed(noise_seed)
        noise = torch.randn(clean.shape, generator=generator) / TEXT_WIDTH**0.5
        return torch.add(clean, noise, alpha=0.3)

    def step(number: int) -> dict[str, torch.Tensor]:
        early = number < early_steps
        if not early and number % 5 == 4:
            batch, labels, chosen, _ = video_batch(encoder, number + seed * 10**6, size // 2)
            pooled = pool_patches(vectors(labels, number)).flatten(0, 1)[chosen]
            losses, _ = answer_loss(model, batch, pooled, probes)
            return losses
        batch, labels, _ = image_batch(encoder, number + seed * 10**6, size, early=early)
        losses, _ = answer_loss(model, batch, vectors(labels, number), probes)
        return losses

    def probe() -> dict[str, float]:
        found: dict[str, list[bool]] = {}
        for k in range(4):
            batch, labels, turns = image_batch(encoder, 30_000_000 + k, 48, early=False)
            _, said = answer_loss(model, batch, vectors(labels, k))
            for kind, values in turn_accuracy(batch, said, turns, encoder).items():
                found.setdefault(kind, []).extend(values)
        batch, labels, chosen, turns = video_batch(encoder, 30_000_000, 32)
        pooled = pool_patches(vectors(labels, 0)).flatten(0, 1)[chosen]
        _, said = answer_loss(model, batch, pooled)
        found |= turn_accuracy(batch, said, turns, encoder)
        return {kind: round(sum(v) / len(v), 3) for kind, v in sorted(found.items())}

    run_stage(
        "words", modules, Schedule(steps, 2e-3, probe_every=100), step, out, seed=seed, probe=probe
    )
    return model.eval(), symbols, encoder
