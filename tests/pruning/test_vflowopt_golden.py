"""VFlowOpt's stages on recorded arrays: in a tiny language model, and in front of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mmlm_efficient.families import Family, family_of
from mmlm_efficient.families.base import Identity, Visual
from mmlm_efficient.families.llava_like import decoder_parts
from mmlm_efficient.pruning import VFlowOpt
from mmlm_efficient.pruning.base import LayerJob, Scene
from mmlm_efficient.pruning.observed import Observed
from mmlm_efficient.stations.bridge import Block, PromptLayout
from mmlm_efficient.stations.handed import CACHE
from mmlm_efficient.stations.layer import LayerCut, LayerRequest, LayerStation
from mmlm_efficient.tokens import TokenPlaces, VisualTokens
from tests import tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "vflowopt"
N_LAYERS, LENGTH, STEPS = 6, 61, 6
IDENTITY = Identity("recorded", "none", N_LAYERS, 16, 1)
CONFIGS = ("c0", "c1", "c2")
ATTENTION = ("sdpa", "eager")


def load(name: str) -> dict[str, Tensor]:
    """One recorded file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays: dict[str, np.ndarray[Any, Any]] = dict(file)
    return {key: torch.from_numpy(np.asarray(array)) for key, array in arrays.items()}


# -- stages 1 and 2 ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages() -> dict[str, Tensor]:
    return load("llm_stages")


@pytest.fixture(scope="module", params=ATTENTION)
def language_model(request: pytest.FixtureRequest) -> Any:
    """The recorded language model."""
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        attn_implementation=request.param,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.load_state_dict(load("llm_weights"))
    return model


@pytest.fixture
def station(language_model: Any) -> Iterator[LayerStation]:
    made = LayerStation(decoder_parts(language_model.model, head=language_model))
    yield made
    made.close()


def cuts_of(config: str, arrays: dict[str, Tensor]) -> tuple[LayerCut, ...]:
    """The cuts that the method makes of a recorded schedule."""
    number = CONFIGS.index(config)
    first, second = arrays["layers"][number].tolist()
    ratios = arrays["ratios"][number].tolist()
    method = VFlowOpt(stage_layers=(first, second), stage_keep_ratios=(1.0, *ratios))
    places, scores = TokenPlaces.grid(4, 10), arrays["s0_importance"]
    tokens = VisualTokens(torch.zeros(40, 16), torch.arange(40), places, 0, scores=scores)
    return method.layer_cuts(LayerJob((tokens,), (40,), (0,), N_LAYERS, IDENTITY))


def request_of(cuts: tuple[LayerCut, ...], arrays: dict[str, Tensor]) -> LayerRequest:
    """The recorded prompt: words, 40 image tokens, words."""
    start, n_image, _ = arrays["start_nimg_ntext"].tolist()
    block = Block(0, start, start + n_image)
    layout = PromptLayout.of(torch.ones(1, LENGTH), [[block]], "left")
    return LayerRequest(layout, cuts, compact=False, gaps=False)


def run(model: Any, embeds: Tensor) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Last hidden state of the prompt, logits of all steps, greedy ids, and cache lengths."""
    cache, logits, ids = DynamicCache(), [], []
    output = model.model(inputs_embeds=embeds, **{CACHE: cache}, use_cache=True)
    state = output.last_hidden_state[0, -1]
    lengths = [cache.get_seq_length(layer) for layer in range(N_LAYERS)]
    last = state
    for step in range(STEPS):
        logits.append(model.lm_head(last))
        ids.append(int(logits[-1].argmax()))
        if step < STEPS - 1:
            output = model.model(
                input_ids=torch.tensor([[ids[-1]]]), **{CACHE: cache}, use_cache=True
            )
            last = output.last_hidden_state[0, -1]
    return state, torch.stack(logits), ids, lengths


@torch.no_grad()
def test_recorded_unpruned_model(language_model: Any, stages: dict[str, Tensor]) -> None:
    state, logits, ids, lengths = run(language_model, stages["s0_inputs_embeds"])
    torch.testing.assert_close(state, stages["s0_full_last_hidden"], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, stages["s0_full_logits"], atol=1e-4, rtol=0)
    assert ids == stages["s0_full_tokens"].tolist()
    assert lengths == [LENGTH] * N_LAYERS


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
def test_recorded_stages(
    language_model: Any, station: LayerStation, stages: dict[str, Tensor], config: str
) -> None:
    seen: dict[int, list[Tensor]] = {layer: [] for layer in range(N_LAYERS)}
    for layer, module in enumerate(language_model.model.layers):

        def watch(_: Any, __: Any, kwargs: dict[str, Any], layer: int = layer) -> None:
            seen[layer].append(kwargs["position_ids"][0].clone())

        # Behind the station's own hook, so that it sees what the layer gets.
        station._handles.append(module.register_forward_pre_hook(watch, with_kwargs=True))
    request = request_of(cuts_of(config, stages), stages)
    with station.active(request):
        state, logits, ids, lengths = run(language_model, stages["s0_inputs_embeds"])

    prefix = f"s0_{config}_causal"
    assert ids == stages[f"{prefix}_tokens"].tolist()
    assert lengths == stages[f"{prefix}_kv_len"].tolist()
    for layer, positions in seen.items():
        assert positions[0].equal(stages[f"s0_{config}_positions_layer{layer}"]), layer
        decoding = [int(one) for one in positions[1:]]
        assert decoding == list(range(LENGTH, LENGTH + STEPS - 1))
    torch.testing.assert_close(state, stages[f"{prefix}_last_hidden"], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, stages[f"{prefix}_logits"], atol=1e-4, rtol=0)
    cosine = torch.cosine_similarity(state, stages["s0_full_last_hidden"], dim=0)
    assert float(cosine) == pytest.approx(float(stages[f"{prefix}_cosine"]), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
def test_no_layer_runs_without_its_mask(
    language_model: Any, station: LayerStation, stages: dict[str, Tensor], config: str
) -> None:
    """The released code lets every token of layer k1 - 1 see the later ones."""
    request = request_of(cuts_of(config, stages), stages)
    with station.active(request):
        state, logits, _, lengths = run(language_model, stages["s0_inputs_embeds"])
    prefix = f"s0_{config}_asreleased"
    assert lengths == stages[f"{prefix}_kv_len"].tolist()
    assert float((state - stages[f"{prefix}_last_hidden"]).abs().max()) > 1e-2
    assert float((logits[0] - stages[f"{prefix}_logits"][0]).abs().max()) > 1e-2


# -- stage 0 -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family() -> Family:
    """LLaVA-OneVision with a grid of 27 x 27, as recorded."""
    config = LlavaOnevisionConfig(
        vision_config=tiny.vision_config("siglip", 1, image_size=384, patch_size=14),
        text_config=tiny.text_config("qwen2", 3),
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=[[384 * rows, 384 * cols] for rows in (1, 2) for cols in (1, 2)],
        vision_aspect_ratio="anyres_max_9",
    )
    return family_of(LlavaOnevisionForConditionalGeneration(config).eval())


def scene_of(family: Family, visual: Visual, maps: Tensor, n_together: int = 1) -> Scene:
    """A scene whose only anchor of each crop pays the recorded importance to the tokens.

    Args:
        family: of the model.
        visual: the image or video.
        maps: recorded importance [C, N] of the tower's tokens.
        n_together: images of the prompt.
    """

    def pack(values: Tensor, newline: float) -> Tensor:
        return family.pack(values, visual, values.new_full((values.shape[-1],), newline))

    def no_pixels() -> Tensor:
        raise AssertionError("no entropy, no pixels")

    seen = [Observed(None, None, one.expand(len(one), -1)) for one in maps]
    return Scene(visual, seen, n_together, 1, no_pixels, pack, family.identity("recorded"))


def vflowopt(ratio: float, grid: float | str, **settings: Any) -> VFlowOpt:
    """Stage 0 alone, with one anchor per crop."""
    return VFlowOpt(
        stage_keep_ratios=(ratio, 1.0, 1.0),
        anchor_threshold=1e6,
        merge_grid_size=grid,
        **settings,
    )


@pytest.mark.parametrize("budget", ["b0", "b1", "b2"])
def test_recorded_recycling_from_map_to_tokens(family: Family, budget: str) -> None:
    arrays = load("recycle_anyres")
    width, height = arrays["s0_image_size_wh"].tolist()
    crops = len(arrays["s0_features"])
    pixels = {
        "pixel_values": torch.zeros(1, crops, 3, 384, 384),
        "image_sizes": torch.tensor([[height, width]]),
    }
    (visual,) = family.visuals(pixels)
    packed = family.pack(arrays["s0_features"], visual, arrays["s0_newline"])
    torch.testing.assert_close(packed, arrays["s0_packed_features"], atol=1e-6, rtol=0)
    tokens = VisualTokens(packed, torch.arange(len(packed)), visual.places, 0)

    ratio, grid = arrays[f"s0_{budget}_ratio_a"].tolist()
    scene = scene_of(family, visual, arrays["s0_importance_tiles"])
    method = vflowopt(ratio, grid)
    _, schedule = method.schedule(scene.identity, 0, len(packed))
    found = method.importance_of(scene, schedule)
    torch.testing.assert_close(found, arrays["s0_packed_importance"], atol=1e-7, rtol=0)
    out = method.reduce(tokens, scene)

    assert out.index.equal(arrays[f"s0_{budget}_keep_mask"].nonzero().flatten())
    assert len(out) == int(arrays[f"s0_{budget}_counts"][-1])
    torch.testing.assert_close(out.features, arrays[f"s0_{budget}_out_tokens"], atol=1e-5, rtol=0)
    assert out.scores is not None
    newline = visual.places.newline[out.index]
    want = arrays[f"s0_{budget}_out_importance"]
    torch.testing.assert_close(out.scores[~newline], want[~newline], atol=1e-6, rtol=0)
    assert bool((want[newline] == 1.0).all())
    assert bool((out.scores[newline] > 1.0).all())
    cell = arrays[f"s0_{budget}_group_id"]
    assert out.members is not None
    for carrier, members in zip(out.index.tolist(), out.members, strict=True):
        own = int(cell[carrier])
        want_members = [carrier] if own < 0 else (cell == own).nonzero().flatten().tolist()
        assert list(members) == want_members


@pytest.mark.parametrize(("budget", "ratio"), [("b0", 0.25), ("b1", 0.1)])
def test_recorded_video_from_map_to_tokens(family: Family, budget: str, ratio: float) -> None:
    arrays = load("video_multi")
    (visual,) = family.visuals({"pixel_values_videos": torch.zeros(1, 3, 3, 384, 384)})
    packed = family.pack(arrays["s0_features"], visual, arrays["s0_newline"])
    tokens = VisualTokens(packed, torch.arange(len(packed)), visual.places, 0)
    scene = scene_of(family, visual, arrays["s0_importance"])
    # A cell size changes nothing: frames are never merged.
    out = vflowopt(ratio, 3.0).reduce(tokens, scene)
    prefix = f"s0_video_{budget}"
    assert out.index.equal(arrays[f"{prefix}_keep_mask"].nonzero().flatten())
    torch.testing.assert_close(out.features, arrays[f"{prefix}_out_tokens"], atol=1e-5, rtol=0)
    assert out.members is None
    assert out.scores is not None
    torch.testing.assert_close(out.scores[:-1], arrays[f"{prefix}_out_importance"][:-1])
    assert out.scores[-1] == torch.inf


@pytest.mark.parametrize(("budget", "ratio"), [("b0", 0.25), ("b1", 0.1)])
def test_recorded_images_of_one_prompt(family: Family, budget: str, ratio: float) -> None:
    """One grid per image, without a newline: places of a plain grid."""
    arrays = load("video_multi")
    prefix = f"s0_multi_{budget}"
    visual = Visual("image", ((27, 27),), TokenPlaces.grid(27, 27))
    for image in range(3):
        maps, features = (arrays[f"s0_{name}"][image] for name in ("importance", "features"))
        tokens = VisualTokens(features, torch.arange(729), visual.places, image)
        scene = scene_of(family, visual, maps[None], n_together=3)
        plain = Scene(**{**vars(scene), "pack": lambda values, _: values[0]})
        out = vflowopt(ratio, 3.0).reduce(tokens, plain)
        assert out.index.equal(arrays[f"{prefix}_keep_mask"][image].nonzero().flatten())
        assert out.features.equal(arrays[f"{prefix}_out_tokens"][image])
        assert out.members is None
