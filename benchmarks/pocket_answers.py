"""What the benchmarks on pocket's scenes do with answers: right or wrong, by scene and kind."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from benchmarks.intervals import Scores
from benchmarks.pocket_accuracy import MAX_NEW_TOKENS, Batch, asked_batches
from benchmarks.progress import Progress
from mmlm_efficient.model import EfficientLMM
from mmlm_efficient.pocket.questions import IMAGE_KINDS, is_right
from mmlm_efficient.prepare import Prepared


@torch.no_grad()
def right_answers(lmm: EfficientLMM, prepared: Prepared, batch: Batch) -> list[int]:
    """1 for every right answer of a batch of questions that is ready to run."""
    width = prepared.layout.mask.shape[1]
    with prepared.active():
        ids = lmm.model.generate(
            **prepared.model_inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
    said = lmm.processor.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    return [
        int(is_right(question, answer))
        for (_, question), answer in zip(batch.asked, said, strict=True)
    ]


def scores_of(
    progress: Progress, names: Iterable[str], scenes: int, batch_size: int
) -> dict[str, Scores]:
    """Right and asked, by scene and kind, for each case by its name."""
    columns = {kind: column for column, kind in enumerate(IMAGE_KINDS)}
    scores = {name: Scores.empty(scenes, len(IMAGE_KINDS)) for name in names}
    for batch in asked_batches(scenes, batch_size):
        if not batch.asked:
            continue
        for name, own in scores.items():
            right = progress.right(batch.number, name)
            for (one, question), value in zip(batch.asked, right, strict=True):
                own.asked[one.index, columns[question.kind]] += 1
                own.right[one.index, columns[question.kind]] += value
    return scores
