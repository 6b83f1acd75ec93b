"""FlowCut keeps exactly the number of tokens that was asked for: random images, random budgets."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.models import (
    IMAGE_TOKEN,
    SMALL_DECODER,
    SMALL_TOWER,
    batch,
    described,
    prompt,
    random_images,
    random_llava,
)
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning.flowcut import ALL_TERMS, FlowCut

MOST_IN_BATCH = 8
# Enough for adaptive cuts of all sizes, see `random_llava`.
CONTRAST = 6.0


def measure_exactness(images: int, seed: int) -> dict[str, Any]:
    """Prune random images to random budgets and count what is left of each.

    Budgets run from 1 to a little more than an image has (then everything must stay); interval,
    first layer, history, criteria and decoder cut are drawn too. Images come in batches of 1 to 8
    in one prompt, each with its own budget.
    """
    rng = np.random.default_rng(seed)
    model = random_llava(
        SMALL_TOWER,
        SMALL_DECODER,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=seed,
        contrast=CONTRAST,
    )
    exact = pruned = done = in_decoder = 0
    mismatches: list[str] = []
    with LMMParts(model) as parts, _quiet(), torch.no_grad():
        bar = tqdm(total=images, desc="exact counts", leave=False, disable=None)
        while done < images:
            count = min(int(rng.integers(1, MOST_IN_BATCH + 1)), images - done)
            method, wanted = _random_method(rng, count)
            problems = _run(parts, method, wanted, int(rng.integers(2**31)))
            exact += sum(problem is None for problem in problems)
            pruned += sum(tokens < SMALL_TOWER.patches for tokens in wanted)
            in_decoder += count * (method.llm_prune_layer is not None)
            mismatches += [f"{problem} ({method!r})" for problem in problems if problem is not None]
            done += count
            bar.update(count)
        bar.close()
    return {
        "tower": described(SMALL_TOWER),
        "images": done,
        "images_with_budget_below_all": pruned,
        "images_cut_in_decoder_too": in_decoder,
        "exact": exact,
        "mismatches": mismatches[:20],
        "met": exact == done,
    }


def _random_method(rng: np.random.Generator, count: int) -> tuple[FlowCut, list[int]]:
    """Settings for a batch, and the tokens that must be left of each image."""
    n = SMALL_TOWER.patches
    budget: dict[str, Any]
    if rng.random() < 0.2:
        ratio = float(rng.uniform(0.005, 1.0))
        budget, left = {"keep_ratio": ratio}, [max(1, int(ratio * n + 1e-9))] * count
    else:
        tokens = [int(value) for value in rng.integers(1, n + 8, size=count)]
        budget, left = {"keep_tokens": tuple(tokens)}, [min(value, n) for value in tokens]
    terms = rng.choice(len(ALL_TERMS), size=int(rng.integers(1, 4)), replace=False)
    method = FlowCut(
        **budget,
        prune_interval=int(rng.integers(1, 4)),
        prune_start_layer=int(rng.integers(0, 5)),
        score_momentum=float(rng.uniform(0, 0.95)),
        score_terms=tuple(ALL_TERMS[term] for term in terms),
        relay="cls" if rng.random() < 0.7 else "mean",
        position_ids="compact" if rng.random() < 0.5 else "original",
    )
    if rng.random() < 0.3:
        decoder = [int(value) for value in rng.integers(1, n + 1, size=count)]
        method = FlowCut(
            **{**method.model_dump(), "llm_prune_layer": 0, "llm_keep_tokens": tuple(decoder)}
        )
        left = [min(tower, later) for tower, later in zip(left, decoder, strict=True)]
    return method, left


def _run(parts: LMMParts, method: FlowCut, wanted: Sequence[int], seed: int) -> list[str | None]:
    """What is wrong with each image's result; None where nothing is."""
    device = torch.device("cpu")
    n = SMALL_TOWER.patches
    words = prompt(len(wanted), n, 5, SMALL_DECODER.vocabulary)
    pixels = random_images(len(wanted), SMALL_TOWER.image_px, device=device, seed=seed)
    inputs = {**batch([words], device), "pixel_values": pixels}
    prepared = prepare(parts, inputs, [method])
    if method.llm_prune_layer is not None:
        with prepared.active():
            parts.model(**prepared.model_inputs, use_cache=True)
    report = prepared.report()
    placeholders = int((prepared.model_inputs["input_ids"] == IMAGE_TOKEN).sum())
    found = sum(image.per_station["bridge"] for image in report.images)
    problems: list[str | None] = []
    for image, tokens in zip(report.images, wanted, strict=True):
        kept = image.kept.tolist()
        problem = None
        if len(kept) != tokens or image.per_station["layer"] != tokens:
            problem = f"asked for {tokens}, got {len(kept)}"
        elif kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= n:
            problem = f"indices not ascending and distinct: {kept}"
        elif placeholders != found:
            problem = f"{placeholders} placeholders for {found} tokens"
        problems.append(problem)
    return problems


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about budgets above the token count: here they are meant."""
    logger = logging.getLogger("mmlm_efficient.pruning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
