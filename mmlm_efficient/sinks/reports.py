"""What VAR did, in terms of the images: columns of shortened prompts become tokens of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mmlm_efficient.sinks.recorder import LayerStats, Recorder
from mmlm_efficient.stations.bridge import PromptLayout
from mmlm_efficient.tokens import ImageAttention, LayerRedistribution, VisualTokens


def layer_reports(
    recorder: Recorder, tokens: Sequence[VisualTokens], entering: PromptLayout
) -> tuple[LayerRedistribution, ...]:
    """The report of a request. Waits for the device.

    Args:
        recorder: of the request.
        tokens: the images' tokens that entered the decoder.
        entering: the prompts as they entered it.

    Returns:
        By prompt and layer; nothing of prompts without images.
    """
    return tuple(
        _layer_report(sample, stats, recorder.layers[stats.layer].layout, tokens, entering)
        for sample, blocks in enumerate(entering.blocks)
        if any(len(block) for block in blocks)
        for stats in recorder.stats(sample)
    )


def _layer_report(
    sample: int,
    stats: LayerStats,
    running: PromptLayout,
    tokens: Sequence[VisualTokens],
    entering: PromptLayout,
) -> LayerRedistribution:
    """One layer of one prompt; running: the prompts as they entered the layer, whose ``origin``
    counts the columns of ``entering``."""
    origin = running.origin[sample]
    padding = int(entering.mask[sample].to(torch.uint8).argmax())
    return LayerRedistribution(
        sample=sample,
        layer=stats.layer,
        images=dict(_images(sample, stats, running, tokens, entering)),
        text_sinks=tuple(int(origin[column]) - padding for column in stats.text_sinks),
        rows=stats.eligible // len(stats.by_head),
        changed=stats.by_head,
        moved=stats.moved,
        gain=stats.gain,
        decoded=stats.decoded,
    )


def _images(
    sample: int,
    stats: LayerStats,
    running: PromptLayout,
    tokens: Sequence[VisualTokens],
    entering: PromptLayout,
) -> Iterator[tuple[int, ImageAttention]]:
    """The images of a prompt, from left to right."""
    starts = {block.image: block.start for block in entering.blocks[sample]}
    sinks, first = set(stats.visual_sinks), 0
    for block in running.blocks[sample]:
        columns = range(block.start, block.stop)
        # A merged token stands in its carrier's column.
        own = running.origin[sample, block.start : block.stop] - starts[block.image]
        index = tokens[block.image].index.detach().to("cpu")
        part = slice(first, first + len(block))
        first += len(block)
        yield (
            block.image,
            ImageAttention(
                index=index[own],
                sink=torch.tensor([column in sinks for column in columns], dtype=torch.bool),
                before=stats.before[:, part],
                after=stats.after[:, part],
            ),
        )
