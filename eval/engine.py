"""Answers of a model to samples, measured; a sample that fails does so alone.

The runner, its Ray workers and the lmms-eval adapter all ask through `Engine`, so that the same
sample gets the same answer everywhere. Greedy answers do not depend on the batch; sampled ones
are drawn one sample at a time, from a seed made of the run's seed and the sample's id.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from eval.task import IMAGE, VIDEO, Sample
from mmlm_efficient import EfficientLMM
from mmlm_efficient.answers import Answer
from mmlm_efficient.errors import MediaError, RunError
from mmlm_efficient.machine import PeakMemory
from mmlm_efficient.prompts import VIDEO_TOKEN, Request
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.tokens import ImageReport

DEFAULT_MAX_NEW_TOKENS = 64
_MESSAGE_CHARACTERS = 500


@dataclass(frozen=True)
class Outcome:
    """What became of one sample.

    Attributes:
        id: of the sample.
        text: the answer, cut at the first of the sample's `until` texts; None if it failed.
        usage: tokens, bytes and seconds, see `usage_of`; empty if it failed.
        finish_reason: "stop" or "length"; None if it failed.
        images: what was kept of its pictures.
        error: {"where": "media" or "model", "type", "message"} if it failed, else None.
    """

    id: str
    text: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    images: tuple[ImageReport, ...] = ()
    error: Mapping[str, str] | None = None


class Engine:
    """A model that answers samples.

    Args:
        lmm: the model; methods come with each call.

    Example:
        >>> from mmlm_efficient import load
        >>> from mmlm_efficient.pocket import scene
        >>> sample = Sample("0", "how many cats are there?", (scene("heldout", 56).image,))
        >>> with load("pocket") as lmm:
        ...     [outcome] = Engine(lmm).answer([sample], lmm.methods)
        >>> outcome.error is None, outcome.usage["visual_tokens_kept"]
        (True, 144)
    """

    def __init__(self, lmm: EfficientLMM) -> None:
        self.lmm = lmm
        self._peak = PeakMemory(lmm.parts.family.input_device)

    def answer(
        self, samples: Sequence[Sample], methods: Sequence[Method], seed: int = 0
    ) -> list[Outcome]:
        """Answer samples, in batches where their settings are the same.

        Args:
            samples: at most as many as fit into memory at once.
            methods: of all of them; () is the stock model.
            seed: of sampling; greedy answers do not use it.

        Returns:
            One outcome per sample, in order. Whatever goes wrong with one sample is its own
            outcome: a batch that fails is asked again sample by sample.

        Raises:
            RunError: the device itself has failed.
        """
        found: dict[str, Outcome] = {}
        for batch in _alike(samples):
            for outcome in self._batch(batch, tuple(methods), seed):
                found[outcome.id] = outcome
        return [found[sample.id] for sample in samples]

    def _batch(
        self, batch: Sequence[Sample], methods: tuple[Method, ...], seed: int
    ) -> list[Outcome]:
        try:
            return self._asked(batch, methods, seed)
        except torch.AcceleratorError as error:
            raise RunError(
                f"the device has failed and would fail every further sample: {error}"
            ) from error
        # Whatever a model raises belongs to its sample; it is recorded, never dropped.
        except Exception as error:  # noqa: BLE001
            failed = failure(batch[0].id, error)
            out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # The error has gone, and with it the tensors that its frames held.
        if out_of_memory:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if len(batch) == 1:
            return [failed]
        return [one for sample in batch for one in self._batch([sample], methods, seed)]

    def _asked(
        self, batch: Sequence[Sample], methods: tuple[Method, ...], seed: int
    ) -> list[Outcome]:
        first = batch[0]
        generation = {"do_sample": False, **first.generation}
        max_new_tokens = generation.pop("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
        own_seed = seed_of(seed, first.id) if generation["do_sample"] else None
        self._peak.reset()
        answers = self.lmm.ask_batch(
            [self._request(sample) for sample in batch],
            methods,
            max_new_tokens,
            own_seed,
            **generation,
        )
        peak_bytes = self._peak.read()
        return [
            Outcome(
                sample.id,
                cut(answer.text, sample.until),
                usage_of(answer, peak_bytes, len(batch)),
                answer.finish_reason,
                answer.report.images,
            )
            for sample, answer in zip(batch, answers, strict=True)
        ]

    def _request(self, sample: Sample) -> Request:
        """The sample with the model's own tokens where its media go."""
        processor = self.lmm.processor
        question = sample.question.replace(IMAGE, processor.image_token)
        question = question.replace(VIDEO, getattr(processor, "video_token", None) or VIDEO_TOKEN)
        return Request(question, list(sample.images) or None, sample.video)


def _alike(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Neighbours whose settings are the same; sampled ones alone."""

    def key(pair: tuple[int, Sample]) -> tuple[str, int]:
        position, sample = pair
        settings = json.dumps(dict(sample.generation), sort_keys=True, default=str)
        return settings, position if sample.generation.get("do_sample") else -1

    for _, group in itertools.groupby(enumerate(samples), key):
        yield [sample for _, sample in group]


def cut(text: str, until: Iterable[str]) -> str:
    """An answer up to the first of some texts, without surrounding blanks.

    Example:
        >>> cut("Yes. Question: and", ["\\n", "Question:"])
        'Yes.'
    """
    places = [text.find(end) for end in until if end]
    first = min((place for place in places if place >= 0), default=len(text))
    return text[:first].strip()


def seed_of(seed: int, sample_id: str) -> int:
    """The seed of one sample in a run: the same wherever and whenever it is asked.

    Example:
        >>> seed_of(0, "7") == seed_of(0, "7"), seed_of(0, "7") == seed_of(1, "7")
        (True, False)
    """
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def usage_of(answer: Answer, peak_bytes: int | None, batch_size: int) -> dict[str, Any]:
    """What one answer cost, for a record.

    Returns:
        visual_tokens_in, visual_tokens_kept (entering the decoder), visual_tokens_mean (entering
        a decoder layer, averaged over the layers), prompt_tokens, completion_tokens; kv_bytes and
        peak_memory_bytes (None if not measured); the seconds of the phases and ttft_s (from the
        request to the first token); batch_size. Seconds and the peak are the whole batch's.
    """
    usage = answer.usage
    return {
        "visual_tokens_in": usage.visual_tokens_in,
        "visual_tokens_kept": usage.visual_tokens_kept["bridge"],
        "visual_tokens_mean": sum(image.mean_decoder_tokens for image in answer.report.images),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "kv_bytes": usage.kv_bytes,
        "peak_memory_bytes": peak_bytes,
        "preprocess_s": round(usage.preprocess_s, 6),
        "tower_s": round(usage.tower_s, 6),
        "prune_s": round(usage.prune_s, 6),
        "prefill_s": round(usage.prefill_s, 6),
        "decode_s": round(usage.decode_s, 6),
        "tokens_per_s": round(usage.tokens_per_s, 3),
        "ttft_s": round(usage.preprocess_s + usage.tower_s + usage.prefill_s, 6),
        "batch_size": batch_size,
    }


def failure(sample_id: str, error: BaseException, where: str = "model") -> Outcome:
    """The outcome of a sample that could not be answered.

    Args:
        sample_id: of the sample.
        error: what was raised; media that cannot be read are told from the model's own errors.
        where: "media", "model", "score" or "worker".
    """
    if isinstance(error, MediaError):
        where = "media"
    message = " ".join(str(error).split())[:_MESSAGE_CHARACTERS]
    return Outcome(
        sample_id, error={"where": where, "type": type(error).__name__, "message": message}
    )
