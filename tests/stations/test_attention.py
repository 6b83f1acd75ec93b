"""Station 4: VAR in a whole language model, against arrays recorded from its official code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from mmlm_efficient.families.llava_like import decoder_parts
from mmlm_efficient.sinks.call import Call, plain_attention
from mmlm_efficient.sinks.recorder import Recorder
from mmlm_efficient.sinks.redistribution import Rule
from mmlm_efficient.sinks.request import RedistributionRequest
from mmlm_efficient.stations.attention import NAME, AttentionStation, AttentionWork
from mmlm_efficient.stations.bridge import Block, PromptLayout
from mmlm_efficient.stations.handed import CACHE

GOLDEN = Path(__file__).parents[1] / "golden" / "var" / "tiny_lm_seed11.npz"
IMAGE = slice(5, 14)
LENGTH = 24
RULE = Rule(min_nonsink_ratio=0.5, min_image_mass=0.2, redistribute_fraction=0.6)
VARIANTS = {"all_layers": (2, 3, 4), "skip_last": (2, 3)}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray[Any, Any]]:
    with np.load(GOLDEN) as arrays:
        return {name: arrays[name] for name in arrays}


@pytest.fixture(scope="module")
def model(golden: dict[str, np.ndarray[Any, Any]]) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    weights = {
        name[3:]: torch.from_numpy(array)
        for name, array in golden.items()
        if name.startswith("w__")
    }
    model.load_state_dict(weights)
    return model


@pytest.fixture
def station(model: LlamaForCausalLM) -> Iterator[AttentionStation]:
    station = AttentionStation(decoder_parts(model.model))
    yield station
    station.close()


def request_of(
    layers: tuple[int, ...],
    recorder: Recorder | None = None,
    rule: Rule = RULE,
    threshold: float = 4.2,
    evaluation: Any = "auto",
) -> RedistributionRequest:
    mask = torch.ones(1, LENGTH, dtype=torch.bool)
    layout = PromptLayout.of(mask, [[Block(0, IMAGE.start, IMAGE.stop)]], "left")
    dims, active = (7, 19), frozenset(layers)
    return RedistributionRequest(
        lambda: layout, rule, dims, threshold, active, evaluation, recorder
    )


@torch.no_grad()
def logits_of(
    model: LlamaForCausalLM, golden: dict[str, np.ndarray[Any, Any]], chunks: Any, tokens: Any
) -> Tensor:
    """Logits of the last position after the prompt and after each fed token, with a cache."""
    embeds = torch.from_numpy(golden["inputs_embeds"])[None]
    cache, found = None, []
    for chunk in chunks:
        output = model(inputs_embeds=embeds[:, chunk], **{CACHE: cache}, use_cache=True)
        cache = output[CACHE]
    found.append(output.logits[0, -1])
    for token in tokens:
        output = model(input_ids=torch.tensor([[int(token)]]), **{CACHE: cache})
        found.append(output.logits[0, -1])
    return torch.stack(found)


WHOLE = [slice(0, LENGTH)]
CHUNKS = [slice(0, 9), slice(9, 17), slice(17, LENGTH)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunks", [WHOLE, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize("evaluation", ["rows", "partial_sums"])
def test_prefill_and_decode_are_the_official_codes(
    model: Any, station: Any, golden: Any, variant: str, chunks: Any, evaluation: str
) -> None:
    request = request_of(VARIANTS[variant], evaluation=evaluation)
    with station.active(request):
        logits = logits_of(model, golden, chunks, golden[f"{variant}__tokens"])
    torch.testing.assert_close(
        logits, torch.from_numpy(golden[f"{variant}__logits"]), atol=2e-4, rtol=0
    )
    flags = torch.zeros(5, LENGTH, dtype=torch.int64)
    for layer in VARIANTS[variant]:
        flags[layer] = request._keys[layer].sink[0]
    assert flags.tolist() == golden[f"{variant}__sink_flags"].tolist()


@dataclass
class Watched:
    """A request that keeps the attention maps [H, Q, K] that its layers work with.

    A map is what a layer makes of unit vectors in place of its values, so it comes from the form
    that makes the output.
    """

    inner: RedistributionRequest
    forwards: list[dict[int, Tensor]] = field(default_factory=list)

    def enter(self, layer: int, hidden: Tensor, kwargs: Mapping[str, Any]) -> WatchedWork:
        if layer == 0:
            self.forwards.append({})
        return WatchedWork(self.inner.enter(layer, hidden, kwargs), layer, self.forwards[-1])

    def report(self, *_: Any) -> tuple[()]:
        return ()


@dataclass
class WatchedWork:
    """The work of one layer, also where the request does nothing there."""

    inner: AttentionWork | None
    layer: int
    maps: dict[int, Tensor]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor | None:
        def of(values: Tensor) -> Tensor | None:
            if self.inner is None:
                return None
            return self.inner.attend(module, query, key, values, mask, scaling)

        keys, width = key.shape[2], key.shape[3]
        parts = []
        for units in torch.eye(keys, -(-keys // width) * width).split(width, dim=1):
            values = units.expand_as(value).contiguous()
            output = of(values)
            if output is None:
                call = Call(query, key, values, mask, scaling)
                output = plain_attention(call).transpose(1, 2)
            parts.append(output[0].transpose(0, 1))
        self.maps[self.layer] = torch.cat(parts, dim=-1)[..., :keys]
        return of(value)


@contextmanager
def official_inputs(model: Any, golden: Any, variant: str, chunks: Any) -> Iterator[None]:
    """Each layer gets the official input [L, D]: what it does is seen without earlier rounding."""
    prompt = golden[f"{variant}__hidden_prefill"]
    forwards = [prompt[:, chunk] for chunk in chunks]
    forwards += [golden[f"{variant}__hidden_decode{step}"] for step in (1, 2, 3)]

    def hook_of(layer: int) -> Any:
        inputs = iter([torch.from_numpy(forward[layer])[None] for forward in forwards])
        return lambda _, args: (next(inputs), *args[1:])

    hooks = [
        module.register_forward_pre_hook(hook_of(layer), prepend=True)  # in front of the station's
        for layer, module in enumerate(model.model.layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunks", [WHOLE, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize("evaluation", ["rows", "partial_sums"])
@pytest.mark.parametrize(("official", "atol"), [(True, 1e-5), (False, 2e-5)])
def test_attention_maps_are_the_official_codes(
    model: Any,
    station: Any,
    golden: Any,
    variant: str,
    chunks: Any,
    evaluation: str,
    official: bool,
    atol: float,
) -> None:
    """All layers, heads and rows, of the prompt and of each fed token."""
    watched = Watched(request_of(VARIANTS[variant], evaluation=evaluation))
    given = official_inputs(model, golden, variant, chunks) if official else nullcontext()
    with station.active(watched), given:
        logits_of(model, golden, chunks, golden[f"{variant}__tokens"])
    found = [torch.stack([maps[layer] for layer in range(5)]) for maps in watched.forwards]
    prompt = [functional.pad(one, (0, LENGTH - one.shape[-1])) for one in found[: len(chunks)]]
    steps = {"prefill": torch.cat(prompt, dim=2)}
    steps |= {f"decode{step}": one for step, one in enumerate(found[len(chunks) :], 1)}
    assert list(steps) == ["prefill", "decode1", "decode2", "decode3"]
    for name, maps in steps.items():
        expected = torch.from_numpy(golden[f"{variant}__attn_{name}"])
        torch.testing.assert_close(maps, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunks", [WHOLE, CHUNKS], ids=["whole", "chunks"])
def test_rows_that_change_are_the_official_codes(
    model: Any, station: Any, golden: Any, variant: str, chunks: Any
) -> None:
    """Exactly: every layer, head and row of the prompt, every layer and head of each fed token."""
    recorder, layers = Recorder(), VARIANTS[variant]
    with station.active(request_of(layers, recorder)):
        logits_of(model, golden, chunks, golden[f"{variant}__tokens"])
    assert set(recorder.layers) == set(layers)
    prefill = torch.zeros(5, 4, LENGTH, dtype=torch.int64)
    decode = torch.zeros(3, 5, 4, dtype=torch.int64)
    for layer, recorded in recorder.layers.items():
        prefill[layer, :, IMAGE.stop :] = torch.cat(
            [piece.selected[0] for piece in recorded.pieces], dim=-1
        )
        assert sorted(recorded.generated) == [0, 1, 2]
        for step, selected in recorded.generated.items():
            decode[step, layer] = selected[0]
    assert prefill.tolist() == golden[f"{variant}__selected_prefill"].tolist()
    assert decode.tolist() == golden[f"{variant}__selected_decode"].tolist()
    counted = {layer: count.tolist() for layer, count in recorder.decoded.items()}
    assert counted == {layer: [3 * 4, int(decode[:, layer].sum())] for layer in layers}
    for stats in recorder.stats(0):
        attention = torch.from_numpy(golden[f"{variant}__attn_prefill"])[stats.layer]
        torch.testing.assert_close(stats.after, attention[:, -1, IMAGE], atol=1e-5, rtol=0)
        assert stats.visual == tuple(range(IMAGE.start, IMAGE.stop))


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_cache_it_is_the_same(
    model: Any, station: Any, golden: Any, variant: str
) -> None:
    embeds = torch.from_numpy(golden["inputs_embeds"])[None]
    request = request_of(VARIANTS[variant])
    tokens = [int(token) for token in golden[f"{variant}__tokens"]]
    with station.active(request), torch.no_grad():
        for step in range(4):
            new = model.model.embed_tokens(torch.tensor([tokens[:step]], dtype=torch.long))
            both = torch.cat([embeds, new], dim=1)
            logits = model(inputs_embeds=both, use_cache=False).logits[0, -1]
            expected = torch.from_numpy(golden[f"{variant}__logits"][step])
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)


def test_idle_it_is_the_stock_model(model: Any, station: Any, golden: Any) -> None:
    stock = logits_of(model, golden, WHOLE, golden["baseline__tokens"])
    torch.testing.assert_close(
        stock, torch.from_numpy(golden["baseline__logits"]), atol=2e-4, rtol=0
    )
    # No sink, nothing to hand on, and no request at all: the same bits.
    none = Rule(min_nonsink_ratio=0.5, min_image_mass=0.2, redistribute_fraction=0.0)
    for request in (request_of((2, 3), threshold=5.6), request_of((2, 3), rule=none)):
        with station.active(request):
            assert model.config._attn_implementation == NAME
            found = logits_of(model, golden, WHOLE, golden["baseline__tokens"])
        assert torch.equal(found, stock)
    assert torch.equal(logits_of(model, golden, WHOLE, golden["baseline__tokens"]), stock)
    station.close()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(model, golden, WHOLE, golden["baseline__tokens"]), stock)


def test_two_prompts_in_a_row_do_not_know_each_other(model: Any, station: Any, golden: Any) -> None:
    """The official code keeps the first prompt's sinks for all that follow."""
    other = {"inputs_embeds": np.roll(golden["inputs_embeds"], 3, axis=0)}
    tokens = golden["skip_last__tokens"]
    alone = {}
    for name, arrays in (("a", golden), ("b", other)):
        with station.active(request_of((2, 3))):
            alone[name] = logits_of(model, arrays, WHOLE, tokens)
    with station.active(request_of((2, 3))):
        again = logits_of(model, golden, WHOLE, tokens)
    assert torch.equal(again, alone["a"])
    request = request_of((2, 3))  # one request, prefilled twice
    with station.active(request):
        first = logits_of(model, other, WHOLE, tokens)
        second = logits_of(model, golden, WHOLE, tokens)
    assert torch.equal(first, alone["b"])
    assert torch.equal(second, alone["a"])
