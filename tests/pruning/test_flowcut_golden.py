"""FlowCut reproduces the arrays that the official code recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, LlamaConfig, LlamaModel

from mmlm_efficient.families.llava_like import decoder_parts, tower_parts
from mmlm_efficient.pruning import FlowCut
from mmlm_efficient.pruning.base import TowerJob
from mmlm_efficient.pruning.flowcut_scores import query_scores
from mmlm_efficient.pruning.flowcut_tower import FlowCutPass, LayerTerms
from mmlm_efficient.stations.bridge import Block, PromptLayout
from mmlm_efficient.stations.handed import CACHE
from mmlm_efficient.stations.layer import LayerCut, LayerRequest, LayerStation, SampleRows
from mmlm_efficient.stations.tower import TowerStation

GOLDEN = Path(__file__).parents[1] / "golden" / "flowcut"
Arrays = dict[str, np.ndarray[Any, Any]]


def load(name: str) -> Arrays:
    """One recorded file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def weights(arrays: Arrays) -> dict[str, torch.Tensor]:
    """The recorded state dict."""
    return {name[2:]: torch.from_numpy(a) for name, a in arrays.items() if name.startswith("w/")}


def tower(arrays: Arrays, layers: int, attn: str) -> CLIPVisionModel:
    """The recorded CLIP tower."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=16,
        num_attention_heads=4,
        num_hidden_layers=layers,
        image_size=32,
        patch_size=4,
        hidden_act="quick_gelu",
        attn_implementation=attn,
    )
    model = CLIPVisionModel(config).eval()
    model.load_state_dict(weights(arrays))
    return model


class Recorded:
    """One pruned forward of a recorded tower."""

    def __init__(self, arrays: Arrays, layers: int, attn: str, images: int, budget: int) -> None:
        model = tower(arrays, layers, attn)
        station = TowerStation(tower_parts(model))
        self.terms: dict[int, LayerTerms] = {}
        settings = FlowCut(keep_tokens=budget, crop_sync="batch")
        job = TowerJob((budget,) * images, 64, layers - 3, has_cls=True)
        self.tower_pass = FlowCutPass(settings, job, self._keep)
        pixels = torch.from_numpy(arrays["pixel_values"])[:images]
        with torch.no_grad(), station.running(self.tower_pass) as run:
            output = model(pixels, output_hidden_states=True)
        station.close()
        self.run = run
        self.feature = output.hidden_states[-2]
        self.cut_layer = run.cut_layer

    def _keep(self, terms: LayerTerms) -> None:
        self.terms[terms.layer] = terms

    def kept_after(self, layer: int) -> torch.Tensor:
        """Original patch indices [B, K] left after a layer."""
        alive = (self.cut_layer < 0) | (self.cut_layer > layer)
        return torch.stack([row.nonzero().squeeze(1) for row in alive])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [24, 8])
@pytest.mark.parametrize(("name", "layers"), [("clip_seed0", 8), ("clip_seed3", 7)])
class TestTower:
    def test_single(self, name: str, layers: int, budget: int, attn: str) -> None:
        arrays = load(name)
        got = Recorded(arrays, layers, attn, images=1, budget=budget)
        want = {
            key.removeprefix(f"T{budget}/single/"): array
            for key, array in arrays.items()
            if key.startswith(f"T{budget}/single/")
        }
        n_in = got.run.layer_counts[0]
        assert n_in == want["n_in"].tolist()
        n_out = [*n_in[1:], n_in[-1]]
        assert n_out == want["n_out"].tolist()
        for layer, count in enumerate(want["prune_count"].tolist()):
            assert count in (-1, n_in[layer] - n_out[layer])
        ratios = []
        for key, array in want.items():
            if "/" not in key:
                continue
            layer, field = int(key.split("/")[0][1:]), key.split("/")[1]
            terms = got.terms[layer]
            if field == "keep_orig":
                assert got.kept_after(layer).tolist() == array.tolist()
            elif field == "keep_local":
                before = got.kept_after(layer - 1)[0] if layer > 0 else torch.arange(64)
                local = torch.isin(before, got.kept_after(layer)[0]).nonzero().squeeze(1)
                assert local.tolist() == array[0].tolist()
            elif field == "entropy_ratio":
                ratios.append(float(array[0]))
            else:
                value = {
                    "cls_attn": terms.attention,
                    "sem": terms.semantic,
                    "vl1": terms.norm,
                    "score": terms.score,
                    "cum": terms.total,
                }[field]
                assert value is not None
                np.testing.assert_allclose(value.numpy(), array, rtol=1e-4, err_msg=key)
        scored = {int(key.split("/")[0][1:]) for key in want if "/" in key}
        assert set(got.terms) == scored
        np.testing.assert_allclose(got.tower_pass.entropy_ratios[0], ratios, rtol=1e-4)
        assert got.run.kept[0].tolist() == want["keep"][0].tolist()
        np.testing.assert_allclose(got.feature.numpy(), want["feature"], atol=1e-4)

    def test_batch_maximum(self, name: str, layers: int, budget: int, attn: str) -> None:
        arrays = load(name)
        got = Recorded(arrays, layers, attn, images=2, budget=budget)
        prefix = f"T{budget}/batch2/"
        for image in range(2):
            n_in = got.run.layer_counts[image]
            assert n_in == arrays[prefix + "n_in"].tolist()
            assert [*n_in[1:], n_in[-1]] == arrays[prefix + "n_out"].tolist()
            assert got.run.kept[image].tolist() == arrays[prefix + "keep"][image].tolist()
        for layer, count in enumerate(arrays[prefix + "prune_count"].tolist()):
            assert count in (-1, n_in[layer] - [*n_in[1:], n_in[-1]][layer])
        for key, array in arrays.items():
            if key.startswith(prefix) and key.endswith("keep_orig"):
                layer = int(key.removeprefix(prefix).split("/")[0][1:])
                assert got.kept_after(layer).tolist() == array.tolist()
        np.testing.assert_allclose(got.feature.numpy(), arrays[prefix + "feature"], atol=1e-4)

    def test_unpruned(self, name: str, layers: int, budget: int, attn: str) -> None:
        arrays = load(name)
        model = tower(arrays, layers, attn)
        with torch.no_grad():
            output = model(torch.from_numpy(arrays["pixel_values"]), output_hidden_states=True)
        np.testing.assert_allclose(
            output.hidden_states[-2].numpy(), arrays["unpruned/feature"], atol=1e-4
        )


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [24, 12, 6])
def test_language_model(budget: int, attn: str) -> None:
    arrays = load("llm_seed0")
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=8,
        attn_implementation=attn,
    )
    model = LlamaModel(config).eval()
    missing = model.load_state_dict(weights(arrays), strict=False)
    assert missing.missing_keys == ["embed_tokens.weight"]
    assert not missing.unexpected_keys
    seen = []

    def score(rows: SampleRows, columns: torch.Tensor) -> torch.Tensor:
        last = torch.tensor([rows.last])
        scores = query_scores(
            rows.query(last)[:, 0],
            rows.values(last)[:, 0],
            rows.keys(columns),
            rows.values(columns),
            rows.scaling,
        )
        seen.append(scores)
        return scores.score

    layout = PromptLayout.of(torch.ones(1, 40), [[Block(0, 5, 29)]], "left")
    request = LayerRequest(layout, [LayerCut(1, (budget,), score)], compact=True, gaps=False)
    station = LayerStation(decoder_parts(model))
    cache = DynamicCache(config=config)
    prefix = f"T{budget}/"
    with torch.no_grad(), station.active(request):
        prefill = model(inputs_embeds=torch.from_numpy(arrays["inputs_embeds"]), **{CACHE: cache})
        lengths = [cache.get_seq_length(layer) for layer in range(4)]
        assert lengths == arrays[prefix + "kv_len_per_layer"].tolist()
        steps = [
            model(inputs_embeds=step.unsqueeze(1), **{CACHE: cache}).last_hidden_state
            for step in torch.from_numpy(arrays["decode_embeds"]).unbind(1)
        ]
    np.testing.assert_allclose(
        prefill.last_hidden_state.numpy(), arrays[prefix + "prefill_last_hidden"], atol=1e-4
    )
    np.testing.assert_allclose(
        torch.cat(steps, 1).numpy(), arrays[prefix + "decode_last_hidden"], atol=1e-4
    )
    if budget == 24:
        assert not seen
        return
    assert request.kept[0].tolist() == arrays[prefix + "keep"][0].tolist()
    for field, value in (
        ("relation", seen[0].relation),
        ("semantic", seen[0].semantic),
        ("vl1", seen[0].norm),
        ("score", seen[0].score),
    ):
        np.testing.assert_allclose(value.numpy(), arrays[prefix + field][0], rtol=1e-4)
