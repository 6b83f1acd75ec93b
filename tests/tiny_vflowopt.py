"""Requests that VFlowOpt prunes, on tiny LLaVA models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmlm_efficient.prepare import LMMParts, Prepared, prepare
from mmlm_efficient.pruning import VFlowOpt
from mmlm_efficient.tokens import ImageReport
from tests import tiny

I = tiny.IMAGE_TOKEN  # noqa: E741
N, G = tiny.N_PATCHES, tiny.GRID
LAYERS, RATIOS, DEPTH = (1, 3), (0.6, 0.7, 0.5), 4
SIDE = 2.0
ONE = [tiny.prompt(1, 5, I, 6, 7)]
PROMPTS = [
    tiny.prompt(1, 5, I, 6, 7),
    tiny.prompt(1, 9, 11),
    tiny.prompt(1, 5, I, I, 6, 7, 8, 12, I, 9),
    tiny.prompt(1, I, 17, 18, 19, 20),
]
IMAGES_OF = ((0,), (), (1, 2, 3), (4,))
STATS = ((0.5, 0.4, 0.3), (0.25, 0.3, 0.2))


def vflowopt(**settings: Any) -> VFlowOpt:
    """A schedule in which every stage does something, with several anchors and cells."""
    given: dict[str, Any] = {
        "stage_layers": LAYERS,
        "stage_keep_ratios": RATIOS,
        "anchor_threshold": 1.0,
        "entropy_weight": 0.0,
        "merge_grid_size": SIDE,
    }
    return VFlowOpt(**{**given, **settings})


def ready(
    parts: LMMParts,
    method: VFlowOpt,
    prompts: Sequence[Sequence[int]] = ONE,
    pixels: Tensor | None = None,
    **options: Any,
) -> Prepared:
    n_images = sum(prompt.count(I) for prompt in prompts) // N
    if pixels is None and n_images:
        pixels = tiny.images(n_images)
    with torch.no_grad():
        return prepare(parts, tiny.batch(prompts, pixels), [method], **options)


@torch.no_grad()
def outcome(model: Any, prepared: Prepared) -> tuple[Tensor, list[ImageReport]]:
    """Logits of the last prompt tokens [B, V] (padding on the left), and the reports."""
    with prepared.active():
        logits = model(**prepared.model_inputs).logits
    return logits[:, -1], list(prepared.report().images)


@torch.no_grad()
def generated(model: Any, prepared: Prepared, **options: Any) -> tuple[list[list[int]], Tensor]:
    """Greedy ids and their logits [B, steps, V]."""
    inputs = prepared.model_inputs
    with prepared.active():
        output = model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    ids = output.sequences[:, inputs["input_ids"].shape[1] :]
    return ids.tolist(), torch.stack(output.logits, dim=1)
