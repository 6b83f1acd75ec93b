"""Random LLaVA models with planted attention sinks, and the eager VAR to compare with.

Random weights have no massive activations, so they are planted: a few visual tokens and the first
token of the prompt are massive in two dimensions, and every head is drawn to such tokens by another
amount, from not at all to most of its attention. Eager VAR is what the released code of VAR does
(the attention map of every layer in full), vectorised and without its state that leaks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.masking_utils import sdpa_mask

from benchmarks.models import BOS_TOKEN, FIRST_WORD, IMAGE_TOKEN
from mmlm_efficient.encoding import Encoded
from mmlm_efficient.prepare import LMMParts
from mmlm_efficient.sinks.evaluations import worth_picking
from mmlm_efficient.sinks.flags import default_threshold, sink_flags
from mmlm_efficient.sinks.redistribution import Keys, Rule, redistribute
from mmlm_efficient.sinks.var import VAR
from mmlm_efficient.stations.handed import CACHE

PER_IMAGE = 576
SINKS_PER_IMAGE = 4
EAGER = "benchmark_full_map"
# A massive activation over sqrt(width), and the steady one that heads recognise it by.
_MASSIVE, _STEADY = 2.0, 3.0
# What a sink's score gains in the head that is drawn to it most.
_LARGEST_PULL = 6.0
_WORK = "benchmark_work"


@dataclass(frozen=True)
class VarShape:
    """A language model under CLIP's 576 tokens per picture.

    Attributes:
        describes: in words, for result files.
        text: config of the language model.
        layers: decoder layers that VAR works in.
    """

    describes: str
    text: Callable[[], LlamaConfig]
    layers: tuple[int, ...]

    def config(self) -> LlavaConfig:
        """Of the whole model; its tower is never run and small."""
        tower = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=336,
            patch_size=14,
        )
        return LlavaConfig(
            vision_config=tower, text_config=self.text(), image_token_index=IMAGE_TOKEN
        )


def _mid() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        max_position_embeddings=4096,
    )


def _seven_billion() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )


SHAPES: dict[str, VarShape] = {
    "mid": VarShape(
        "Llama text model of middle size inside LLaVA: 8 layers, 1024 wide, 16 heads of 128",
        _mid,
        tuple(range(1, 8)),
    ),
    "llava-next-7b": VarShape(
        "LLaMA-2-7B inside LLaVA: 32 layers, 4096 wide, 32 heads of 128",
        _seven_billion,
        tuple(range(2, 31)),
    ),
}


def random_model(shape: VarShape, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """The model of a shape with random weights and planted sinks, in eval mode."""
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(shape.config())
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    model.eval()
    _plant(model)
    return model


def sink_dims(config: Any) -> tuple[int, int]:
    """The dimensions that sinks are massive in."""
    width = int(config.text_config.hidden_size)
    return width // 3, 2 * width // 3


def _steady_dim(config: Any) -> int:
    return int(config.text_config.hidden_size) - 1


def _massive(config: Any) -> float:
    return _MASSIVE * math.sqrt(config.text_config.hidden_size)


def _plant(model: Any) -> None:
    """Make the first token massive, and heads look at what is."""
    config, text = model.config, model.config.text_config
    dims, steady = list(sink_dims(config)), _steady_dim(config)
    words = model.model.language_model.embed_tokens.weight
    words.mul_(1.0 / text.initializer_range)
    words[:, dims] = 0.0
    words[:, steady] = _STEADY
    words[BOS_TOKEN, dims[0]] = _massive(config)
    heads = text.num_attention_heads
    pulls = torch.linspace(0, _LARGEST_PULL, heads)
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        # The slowest of the rotary pairs: nearly the same at all distances.
        slowest = attention.head_dim // 2 - 1
        typical = (_STEADY / 2) * 0.8 * math.sqrt(text.hidden_size)
        strength = pulls * math.sqrt(attention.head_dim) / typical
        queries = attention.q_proj.weight.view(heads, attention.head_dim, -1)
        queries[:, slowest, steady] = strength.to(queries)
        keys = attention.k_proj.weight.view(text.num_key_value_heads, attention.head_dim, -1)
        keys[:, slowest, dims] = 1.0


def features(
    model: Any, images: int, device: torch.device, seed: int, per_image: int = PER_IMAGE
) -> list[Tensor]:
    """Random visual tokens [per_image, D] of some images, four of each image massive."""
    generator = torch.Generator().manual_seed(seed)
    dims, massive = list(sink_dims(model.config)), _massive(model.config)
    found = []
    for _ in range(images):
        tokens = torch.randn(per_image, model.config.text_config.hidden_size, generator=generator)
        tokens[:, dims] = 0.0
        tokens[:, _steady_dim(model.config)] = _STEADY
        sinks = torch.randperm(per_image, generator=generator)[:SINKS_PER_IMAGE]
        for number, place in enumerate(sinks.tolist()):
            tokens[place, dims[number % len(dims)]] = massive
        found.append(tokens.to(device=device, dtype=model.dtype))
    return found


@dataclass(frozen=True)
class Request:
    """One prompt: text, images, text; between the images there may be text too.

    Attributes:
        ids: int64 [1, S].
        encoded: the images as the tower would have left them.
        first: first text token behind an image.
    """

    ids: Tensor
    encoded: Encoded
    first: int

    @property
    def visual(self) -> Tensor:
        """Bool [1, S]."""
        return self.ids == IMAGE_TOKEN

    def eligible(self, start: int, end: int) -> Tensor:
        """Bool [1, end - start]: text behind the first image, generated tokens too."""
        text = ~self.visual[:, start:end]
        text = torch.nn.functional.pad(text, (0, end - start - text.shape[1]), value=True)
        return text & (torch.arange(start, end, device=text.device) >= self.first)


def request(
    parts: LMMParts,
    images: int,
    before: int,
    after: int,
    device: torch.device,
    seed: int,
    between: int = 0,
) -> Request:
    """A prompt with so many tokens of text; no tower runs for it."""
    model = parts.model
    size = int(model.config.vision_config.image_size)
    pixels = torch.empty(images, 3, size, size, device="meta")
    visuals = parts.family.visuals({"pixel_values": pixels})
    per_image = parts.family.tokens_of(visuals[0])
    vocabulary = int(model.config.text_config.vocab_size) - FIRST_WORD
    words = [FIRST_WORD + place % vocabulary for place in range(before - 1 + after)]
    gap = words[:between]
    shown = [token for _ in range(images) for token in (*gap, *[IMAGE_TOKEN] * per_image)]
    ids = [BOS_TOKEN, *words[: before - 1], *shown[between:], *words[before - 1 :]]
    found = features(model, images, device, seed, per_image)
    return Request(
        torch.tensor([ids], device=device),
        Encoded(visuals, None, found),
        before + (per_image if between else per_image * images),
    )


def method(shape: VarShape, config: Any, **settings: Any) -> VAR:
    """VAR with its defaults and the planted dimensions."""
    threshold = default_threshold(int(config.text_config.hidden_size))
    chosen = {"sink_dims": sink_dims(config), "sink_threshold": threshold, "layers": shape.layers}
    return VAR(**{**chosen, **settings})


def twin(model: nn.Module) -> Any:
    """The same weights in other modules: hooks and attention functions of one leave the other
    alone."""
    held = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in held})


# -- eager VAR -------------------------------------------------------------------------------


@dataclass
class EagerVar:
    """VAR by the definition, on the whole map of every layer.

    Args:
        model: its decoder is switched to full maps; hooks are on its layers inside `active`.
        rule: thresholds.
        dims, threshold: of the sinks.
        layers: decoder layers that change.

    Attributes:
        calls: inputs of the attention of `tap` in the latest forward, when `tap` is a layer.
    """

    model: Any
    rule: Rule
    dims: Sequence[int]
    threshold: float
    layers: Sequence[int]
    tap: int | None = None
    calls: list[AttentionCall] = field(default_factory=list)
    _keys: dict[int, Keys] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model.model.language_model.set_attn_implementation(EAGER)

    @contextmanager
    def active(self, one: Request) -> Iterator[None]:
        """Work on one prompt inside the `with` block."""
        decoder = self.model.model.language_model
        handles = [
            decoder.layers[layer].register_forward_pre_hook(
                self._entering(layer, one), with_kwargs=True
            )
            for layer in self.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, layer: int, one: Request) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden: Tensor = args[0]
            past = int(kwargs[CACHE].get_seq_length(layer))
            if past == 0:
                visible = torch.ones_like(one.visual)
                flags = sink_flags(hidden, self.dims, self.threshold, visible)
                self._keys[layer] = Keys(one.visual, flags)
            first = max(0, one.first - past)
            eligible = one.eligible(past + first, past + hidden.shape[1])
            work = _Work(self, layer, first, self._keys[layer], eligible)
            return args, {**kwargs, _WORK: work}

        return hook


@dataclass(frozen=True)
class _Work:
    owner: EagerVar
    layer: int
    first: int
    keys: Keys
    eligible: Tensor


@dataclass(frozen=True)
class AttentionCall:
    """What the attention of one layer was called with.

    Attributes:
        module: the attention module.
        query, key, value: [1, H, Q, d], [1, Hkv, K, d] twice.
        scaling: of the scores.
        first: first row that may change.
        keys: flags of the prompt's keys.
        eligible: bool [1, Q - first].
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    first: int
    keys: Keys
    eligible: Tensor

    @cached_property
    def picked(self) -> Tensor | None:
        """As `attend` takes it."""
        found = torch.nonzero(self.eligible[0]).flatten()
        return found if worth_picking(len(found), self.eligible.shape[1]) else None


def full_map_attention(call: AttentionCall, rule: Rule | None) -> Tensor:
    """The attention [1, Q, H, d] of a call by its whole map; without a rule nothing changes."""
    grouping = call.query.shape[1] // call.key.shape[1]
    key, value = (t.repeat_interleave(grouping, dim=1) for t in (call.key, call.value))
    scores = call.query @ key.transpose(2, 3) * call.scaling
    rows, keys = scores.shape[-2:]
    if rows > 1:
        seen = torch.ones(rows, keys, dtype=torch.bool, device=scores.device).tril_(keys - rows)
        scores.masked_fill_(~seen, -math.inf)
    probabilities = scores.softmax(dim=-1, dtype=torch.float32)
    del scores
    if rule is not None:
        late = probabilities[:, :, call.first :]
        late.copy_(redistribute(late, call.keys, call.eligible, rule)[0])
    return (probabilities.to(value.dtype) @ value).transpose(1, 2).contiguous()


def _full_map(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that the model finds under `EAGER`; one prompt, no padding."""
    if attention_mask is not None:
        raise ValueError("eager VAR is for one prompt without padding")
    work: _Work | None = kwargs.get(_WORK)
    if work is None:
        empty = torch.zeros(1, 0, dtype=torch.bool, device=query.device)
        call = AttentionCall(module, query, key, value, scaling, 0, Keys(empty, empty), empty)
        return full_map_attention(call, None), None
    call = AttentionCall(module, query, key, value, scaling, work.first, work.keys, work.eligible)
    if work.layer == work.owner.tap:
        work.owner.calls.append(call)
    return full_map_attention(call, work.owner.rule), None


AttentionInterface.register(EAGER, _full_map)
AttentionMaskInterface.register(EAGER, sdpa_mask)
