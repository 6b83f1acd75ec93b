"""What a request returns: the text, what it cost, and what was pruned."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from mmlm_efficient.tokens import PruningReport

STATIONS = ("tower", "bridge", "layer")

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Usage:
    """What one answer cost.

    In a batch the prompts run together: the seconds are those of the whole batch, the bytes an
    even share of its cache.

    Attributes:
        prompt_tokens: tokens that entered the language model, after the bridge.
        visual_tokens_in: visual tokens before pruning, all images together.
        visual_tokens_kept: visual tokens leaving each station ("tower", "bridge", "layer").
        completion_tokens: generated tokens, the end token included.
        kv_bytes: keys and values held when the answer was complete, bytes.
        preprocess_s: chat template, tokenizer and image processor, seconds.
        tower_s: vision tower and projector, pruning inside the tower included, seconds; on CUDA
            by the device's own clock.
        prune_s: scoring and cutting at all stations (a part of tower_s and prefill_s), seconds.
        prefill_s: from the visual tokens to the first new token, seconds.
        decode_s: all further tokens, seconds.
        tokens_per_s: further tokens per second of decode_s; 0 when there was only one token.
    """

    prompt_tokens: int
    visual_tokens_in: int
    visual_tokens_kept: Mapping[str, int]
    completion_tokens: int
    kv_bytes: int
    preprocess_s: float
    tower_s: float
    prune_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers by name, for JSON."""
        return {**dataclasses.asdict(self), "visual_tokens_kept": dict(self.visual_tokens_kept)}


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Attributes:
        text: the generated text, without special tokens and surrounding blanks.
        usage: tokens, bytes and seconds.
        report: which visual tokens were kept, per image and station, and what VAR did if asked.
        finish_reason: "stop" (the model ended), "length" (max_new_tokens or the context is used
            up) or "cancelled" (a stream was closed early).
    """

    text: str
    usage: Usage
    report: PruningReport
    finish_reason: FinishReason

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """What a script reads from `mmlm ask --json`: text, usage, the kept patches, and what VAR
        did in each layer if `return_stats` asks for it."""
        images = [
            {
                "image": image.image,
                "grid": list(image.grid),
                "kept": image.kept.tolist(),
                "per_station": dict(image.per_station),
                "mean_decoder_tokens": image.mean_decoder_tokens,
            }
            for image in self.report.images
        ]
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "methods": list(self.report.methods),
            "usage": self.usage.to_dict(),
            "images": images,
            "redistribution": [layer.to_dict() for layer in self.report.redistribution],
        }


@dataclass(frozen=True)
class Run:
    """One finished batch, before its tokens are read.

    Attributes:
        prompt_tokens: tokens of each prompt that entered the language model.
        tokens_per_image: visual tokens of each image before pruning.
        report: of the whole batch.
        end_ids: token ids that end an answer.
        pad_id: id behind the end of shorter answers, or None.
        limit: new tokens at which generation stops.
        cancelled: a halt was called.
        cache_bytes: keys and values of each prompt, bytes.
        preprocess_s, prefill_s, decode_s: seconds of the phases.
    """

    prompt_tokens: Sequence[int]
    tokens_per_image: Sequence[int]
    report: PruningReport
    end_ids: Collection[int]
    pad_id: int | None
    limit: int
    cancelled: bool
    cache_bytes: int
    preprocess_s: float
    prefill_s: float
    decode_s: float

    def answer(
        self, sample: int, new_ids: Sequence[int], tokenizer: Any, length: int | None = None
    ) -> Answer:
        """The answer to one prompt of the batch.

        Args:
            sample: position of the prompt.
            new_ids: generated ids, with whatever padding follows.
            tokenizer: decodes them.
            length: how many of them there were when a stopping criterion ended the answer, if
                one did.
        """
        ids, ended = self._until_end(new_ids, length)
        finish: FinishReason = "stop" if ended or len(ids) < self.limit else "length"
        if self.cancelled and not ended:
            finish = "cancelled"
        images = tuple(image for image in self.report.images if image.sample == sample)
        usage = Usage(
            prompt_tokens=self.prompt_tokens[sample],
            visual_tokens_in=sum(self.tokens_per_image[image.image] for image in images),
            visual_tokens_kept={
                station: sum(image.per_station[station] for image in images) for station in STATIONS
            },
            completion_tokens=len(ids),
            kv_bytes=self.cache_bytes,
            preprocess_s=self.preprocess_s,
            tower_s=self.report.seconds.get("tower_s", 0.0),
            prune_s=self.report.seconds.get("prune_s", 0.0),
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
            tokens_per_s=(len(ids) - 1) / self.decode_s if len(ids) > 1 else 0.0,
        )
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        # Of tokens behind the end, which a batch runs on with, nothing is reported.
        layers = tuple(
            replace(layer, decoded=layer.decoded[: max(0, len(ids) - 1)])
            for layer in self.report.redistribution
            if layer.sample == sample
        )
        report = PruningReport(images, self.report.seconds, self.report.methods, layers)
        return Answer(text, usage, report, finish)

    def _until_end(self, new_ids: Sequence[int], length: int | None) -> tuple[list[int], bool]:
        """The ids up to the end, an end token among them, and whether they ended by themselves."""
        ids = list(new_ids[:length])
        for position, token in enumerate(ids):
            if token in self.end_ids:
                return ids[: position + 1], True
        while length is None and ids and ids[-1] == self.pad_id:
            ids.pop()
        return ids, length is not None


def kv_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache of transformers holds.

    Args:
        cache: a transformers Cache, or None when generation ran without one.
    """
    if cache is None:
        return 0
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(
        tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor)
    )
