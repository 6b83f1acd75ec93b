"""Station 2: the bridge from visual tokens to the prompt.

The processor writes one placeholder per stock visual token. This file finds each image's block of
placeholders, checks them against the images, and rebuilds the prompt around the tokens that are
kept. Its :class:`PromptLayout` also serves the layer station, which cuts hidden states by the
same rule. Nothing here hooks into the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmlm_efficient.errors import PromptError, UnsupportedError

PaddingSide = Literal["left", "right"]
# The label that the losses of transformers leave out.
IGNORED_LABEL = -100
# What fills the padding of per-token inputs; everything not listed is filled with 0.
_FILL = {"labels": IGNORED_LABEL}


@dataclass(frozen=True)
class Block:
    """The visual tokens of one image: columns start..stop-1 of its prompt."""

    image: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class PromptLayout:
    """Where things are in a padded batch of prompts, before or after cuts. All on the CPU.

    Attributes:
        mask: bool [B, S], False on padding.
        blocks: for each sample, its image blocks from left to right.
        padding_side: side on which shorter samples are padded.
        origin: int64 [B, S], column of the uncut prompt that each column came from.
        shift: int64 [B, S], tokens cut before each column in its own sample.
        removed: int64 [B], tokens cut from each sample.
        width: columns of the uncut batch.
    """

    mask: Tensor
    blocks: tuple[tuple[Block, ...], ...]
    padding_side: PaddingSide
    origin: Tensor
    shift: Tensor
    removed: Tensor
    width: int

    @classmethod
    def of(
        cls, mask: Tensor, blocks: Sequence[Sequence[Block]], padding_side: PaddingSide
    ) -> PromptLayout:
        """The layout of an uncut batch; mask [B, S] may be of any dtype and device."""
        mask = mask.detach().to("cpu") != 0
        n_samples, length = mask.shape
        return cls(
            mask=mask,
            blocks=tuple(tuple(sample) for sample in blocks),
            padding_side=padding_side,
            origin=torch.arange(length).repeat(n_samples, 1),
            shift=torch.zeros(n_samples, length, dtype=torch.long),
            removed=torch.zeros(n_samples, dtype=torch.long),
            width=length,
        )

    def cut(self, keep: Mapping[int, Tensor]) -> tuple[PromptLayout, Tensor]:
        """Keep some tokens of some images and pad again.

        Args:
            keep: for each image to cut, int64 positions inside its block, in their new order.

        Returns:
            The new layout and source [B, S'], the column of this layout that each new column is
            gathered from (any column for padding, which the new mask hides).
        """
        kept_columns, blocks = [], []
        for row, sample in zip(self.mask, self.blocks, strict=True):
            parts, sizes, done = [], [], 0
            for block in sample:
                parts.append(row[done : block.start].nonzero().squeeze(1) + done)
                if block.image in keep:
                    inside = keep[block.image].to("cpu")
                else:
                    inside = row[block.start : block.stop].nonzero().squeeze(1)
                parts.append(inside + block.start)
                sizes.append((block, len(inside)))
                done = block.stop
            parts.append(row[done:].nonzero().squeeze(1) + done)
            kept_columns.append(torch.cat(parts))
            blocks.append(sizes)
        length = max(int(columns.shape[0]) for columns in kept_columns)
        source = torch.zeros(len(kept_columns), length, dtype=torch.long)
        mask = torch.zeros(len(kept_columns), length, dtype=torch.bool)
        cut_before = torch.zeros_like(source)
        new_blocks = []
        for index, columns in enumerate(kept_columns):
            n_kept = int(columns.shape[0])
            first = length - n_kept if self.padding_side == "left" else 0
            source[index, first : first + n_kept] = columns
            mask[index, first : first + n_kept] = True
            rank = self.mask[index].long().cumsum(0) - 1
            cut_before[index, first : first + n_kept] = rank[columns] - torch.arange(n_kept)
            new_blocks.append(_moved(blocks[index], columns, first))
        layout = PromptLayout(
            mask=mask,
            blocks=tuple(new_blocks),
            padding_side=self.padding_side,
            origin=self.origin.gather(1, source),
            shift=self.shift.gather(1, source) + cut_before,
            removed=self.removed + self.mask.sum(1) - mask.sum(1),
            width=self.width,
        )
        return layout, source

    def text(self, sample: int) -> Tensor:
        """Columns int64 of a prompt's tokens that belong to no image."""
        words = self.mask[sample].clone()
        for block in self.blocks[sample]:
            words[block.start : block.stop] = False
        return words.nonzero().squeeze(1)

    def extended(self, n_new: int) -> PromptLayout:
        """The layout after n_new generated tokens, appended at the right of every sample."""
        if n_new == 0:
            return self
        n_samples = self.mask.shape[0]
        new_columns = torch.arange(self.width, self.width + n_new).expand(n_samples, -1)
        return PromptLayout(
            mask=torch.cat([self.mask, self.mask.new_ones(n_samples, n_new)], dim=1),
            blocks=self.blocks,
            padding_side=self.padding_side,
            origin=torch.cat([self.origin, new_columns], dim=1),
            shift=torch.cat([self.shift, self.removed.unsqueeze(1).expand(-1, n_new)], dim=1),
            removed=self.removed,
            width=self.width + n_new,
        )


def _moved(blocks: Sequence[tuple[Block, int]], columns: Tensor, first: int) -> tuple[Block, ...]:
    """Blocks with their new sizes at their places among the kept columns."""
    moved = []
    for block, size in blocks:
        # Inside a block the order may have changed; in front of it nothing has.
        start = first + int((columns < block.start).sum())
        moved.append(Block(block.image, start, start + size))
    return tuple(moved)


def find_blocks(
    input_ids: Tensor, visuals: Sequence[tuple[int, int]]
) -> tuple[tuple[Block, ...], ...]:
    """Find the image blocks of a batch of prompts and check them against the images.

    Args:
        input_ids: int64 [B, S] with one placeholder per stock visual token.
        visuals: (placeholder id, stock tokens) of every image and video of the batch; those
            with one placeholder are in prompt order.

    Returns:
        For each prompt its blocks from left to right; `Block.image` counts the visuals.

    Raises:
        PromptError: a run of placeholders is no whole number of images, or the prompts hold
            another number of images than was given.
    """
    waiting: dict[int, list[int]] = {}
    for image, (placeholder, _) in enumerate(visuals):
        waiting.setdefault(placeholder, []).append(image)
    found: dict[int, int] = dict.fromkeys(waiting, 0)
    samples: list[tuple[Block, ...]] = []
    for row, ids in enumerate(input_ids.tolist()):
        blocks: list[Block] = []
        column = 0
        while column < len(ids):
            placeholder = ids[column]
            if placeholder not in waiting:
                column += 1
                continue
            stop = column
            while stop < len(ids) and ids[stop] == placeholder:
                stop += 1
            images, run = waiting[placeholder], stop - column
            while column < stop:
                number = found[placeholder]
                # Behind the last image its size tells how many more the prompts ask for.
                image = images[min(number, len(images) - 1)]
                size = visuals[image][1]
                if stop - column < size:
                    raise PromptError(
                        f"image {number} (prompt {row}, token {column}): expected {size} "
                        f"placeholders per image, got a run of {run}. Write one image "
                        "token per image, let the processor expand it, and do not truncate the "
                        "prompt inside an image."
                    )
                if number < len(images):
                    blocks.append(Block(image, column, column + size))
                found[placeholder] += 1
                column += size
        samples.append(tuple(blocks))
    for placeholder, images in waiting.items():
        if found[placeholder] != len(images):
            raise PromptError(
                f"the prompts hold {found[placeholder]} image(s), but {len(images)} image(s) were "
                f"given: image {min(found[placeholder], len(images))} has no counterpart. Give "
                "one image per image token, in the order of the prompts."
            )
    return tuple(samples)


def check_images_given(
    input_ids: Tensor, placeholder_id: int, tokens_per_image: int, cached: int
) -> None:
    """Refuse placeholders of prompts without images, unless a cache covers them.

    Args:
        input_ids: int64 [B, S].
        placeholder_id: token id of the placeholder.
        tokens_per_image: placeholders of one image of the model's usual size.
        cached: leading tokens of every prompt that a cache holds.

    Raises:
        PromptError: placeholders behind the cached tokens.
    """
    count = int((input_ids[:, cached:] == placeholder_id).sum())
    if count == 0:
        return
    if cached:
        raise PromptError(
            f"behind the {cached} tokens that the cache holds, the prompts hold {count} "
            f"placeholders of images ({tokens_per_image} each). A cache that was filled with "
            "pruning is shorter than its prompt and cannot be continued like this: give the "
            "whole conversation with its pixel_values and no cache."
        )
    raise PromptError(
        f"the prompts hold {count // tokens_per_image} image(s) ({count} placeholders, "
        f"{tokens_per_image} each), but 0 image(s) were given. Give pixel_values, one image per "
        "image token, as the processor returns them."
    )


def check_mask(inputs: Mapping[str, Any]) -> None:
    """Refuse an attention mask that does not say for each token whether it is padding.

    Args:
        inputs: model inputs; attention_mask, if any, must be [B, S], as input_ids are.

    Raises:
        PromptError: it has another shape.
    """
    mask, want = inputs.get("attention_mask"), list(inputs["input_ids"].shape)
    if mask is None:
        return
    got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if got != want:
        raise PromptError(
            f"attention_mask: expected a tensor of shape {want}, that of input_ids, got {got}. "
            "Where tokens are pruned, their columns are cut from both. Give the mask that the "
            "processor returns with these input_ids, or none where nothing is padded."
        )


def check_visible(layout: PromptLayout) -> None:
    """Refuse a mask that hides visual tokens: methods choose among the tokens that are seen.

    Raises:
        PromptError: padding inside an image block.
    """
    for sample, blocks in enumerate(layout.blocks):
        for block in blocks:
            hidden = int((~layout.mask[sample, block.start : block.stop]).sum())
            if hidden:
                raise PromptError(
                    f"attention_mask: hides {hidden} of the {len(block)} tokens of image "
                    f"{block.image} (prompt {sample}, tokens {block.start} to {block.stop - 1}). "
                    "Where tokens are pruned, only padding in front of or behind a prompt may be "
                    "0: set the mask to 1 on images, and name unwanted patches with keep_mask."
                )


def prompt_positions(mask: Tensor) -> Tensor:
    """Position ids [B, S] counted over real tokens, as ``generate()`` counts them."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def shortened(
    inputs: Mapping[str, Tensor],
    layout: PromptLayout,
    source: Tensor,
    *,
    pad_token_id: int,
    original_positions: bool,
    axes: Tensor | None = None,
) -> dict[str, Tensor]:
    """Per-token model inputs for a cut prompt.

    Args:
        inputs: processor output; every tensor of the shape of its input_ids is cut alike.
        layout, source: result of :meth:`PromptLayout.cut`.
        pad_token_id: id written on padding.
        original_positions: also give position_ids, each token keeping its position in the uncut
            prompt. ``generate()`` continues them from the last one, the uncut prompt's end.
            Position ids among the inputs are kept with it, and renumbered without it: each is
            lowered by the tokens cut before it.
        axes: int64 [3, B, S], positions of the uncut prompt in a model that counts them along
            several axes (M-RoPE); they are kept as they are.

    Returns:
        The inputs [B, S'], with the attention mask always present.

    Raises:
        PromptError: position ids among the inputs do not ascend, or have another shape; or
            labels do.
        UnsupportedError: labels together with logits_to_keep.
    """
    check_labels(inputs)
    input_ids = inputs["input_ids"]
    device = input_ids.device
    mask, source = layout.mask.to(device), source.to(device)
    fill = {"input_ids": pad_token_id, **_FILL}
    result: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == input_ids.shape:
            result[name] = value.gather(1, source).masked_fill(~mask, fill.get(name, 0))
        else:
            result[name] = value
    dtype = inputs["attention_mask"].dtype if "attention_mask" in inputs else torch.long
    result["attention_mask"] = mask.to(dtype)
    if axes is not None:
        result["position_ids"] = axes.gather(2, source.expand(len(axes), -1, -1))
    elif original_positions or "position_ids" in inputs:
        positions = _positions_of(inputs).gather(1, source)
        if not original_positions:
            positions = positions - layout.shift.to(device)
        result["position_ids"] = positions.masked_fill(~mask, 0)
    return result


def check_labels(inputs: Mapping[str, Any]) -> None:
    """Refuse labels that cannot follow their tokens through a cut.

    Args:
        inputs: model inputs; labels, if any, must be int64 [B, S], as input_ids are.

    Raises:
        PromptError: labels have another shape.
        UnsupportedError: labels together with logits_to_keep, which counts columns after the cut.
    """
    labels, keep = inputs.get("labels"), inputs.get("logits_to_keep")
    if labels is None:
        return
    if isinstance(keep, Tensor) or keep:
        raise UnsupportedError(
            "labels together with logits_to_keep: where tokens are pruned, the last columns of the "
            "prompt are others than before. Leave logits_to_keep out, give labels for all of "
            f"input_ids and set those that are to have no loss to {IGNORED_LABEL}."
        )
    want, got = list(inputs["input_ids"].shape), list(labels.shape)
    if got != want:
        raise PromptError(
            f"labels: expected shape {want}, that of input_ids, got {got}. Give one label per "
            f"token of the unpruned prompt, {IGNORED_LABEL} for no loss: they are cut with it."
        )


def _positions_of(inputs: Mapping[str, Tensor]) -> Tensor:
    """Position ids [B, S] of the uncut prompt: the caller's, or counted over its real tokens."""
    mask, given = _mask_of(inputs), inputs.get("position_ids")
    if given is None:
        return prompt_positions(mask)
    if given.ndim != 2 or given.shape[1] != mask.shape[1] or len(given) not in (1, len(mask)):
        raise PromptError(
            f"position_ids: expected shape {list(mask.shape)}, that of input_ids, got "
            f"{list(given.shape)}. Leave them out to have them counted."
        )
    given = given.expand(len(mask), -1)
    for sample, (row, real) in enumerate(zip(given, mask != 0, strict=True)):
        if bool((row[real].diff() <= 0).any()):
            raise PromptError(
                f"position_ids of prompt {sample} do not ascend. Prompts packed into one row "
                "cannot be pruned: give each its own row."
            )
    return given


def _mask_of(inputs: Mapping[str, Tensor]) -> Tensor:
    """The attention mask of the inputs; all ones when there is none."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask
