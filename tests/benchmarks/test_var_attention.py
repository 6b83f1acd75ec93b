"""VAR's benchmark of time and memory: planted sinks, eager VAR, and a small run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import readme_tables, var_attention, var_models, var_subject
from benchmarks.var_models import SINKS_PER_IMAGE, VarShape
from benchmarks.var_subject import EAGER, OURS, PHASES, SDPA
from mmlm_efficient.families import family_of
from mmlm_efficient.prepare import LMMParts
from mmlm_efficient.sinks.flags import sink_flags

TINY = VarShape(
    "tiny",
    lambda: LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.12,
        max_position_embeddings=4096,
    ),
    (1, 2),
)


@pytest.fixture
def parts() -> Any:
    model = var_models.random_model(TINY, torch.device("cpu"), torch.float32, seed=0)
    with LMMParts(model) as found:
        yield found


def test_twins_share_weights_and_nothing_else(parts: LMMParts) -> None:
    other = var_models.twin(parts.model)
    pairs = list(zip(parts.model.parameters(), other.parameters(), strict=True))
    assert all(mine is theirs for mine, theirs in pairs)
    other.model.language_model.set_attn_implementation(var_models.EAGER)
    assert parts.model.config.text_config._attn_implementation == "sdpa"
    assert other.model.language_model.layers[0] is not parts.model.model.language_model.layers[0]


def test_the_prompt_and_its_sinks(parts: LMMParts) -> None:
    one = var_models.request(parts, 2, 5, 7, torch.device("cpu"), seed=0)
    assert one.ids.shape == (1, 5 + 2 * 576 + 7)
    assert one.first == 5 + 2 * 576
    assert int(one.visual.sum()) == 2 * 576
    assert not one.visual[0, one.first :].any()
    assert one.encoded.features is not None
    dims = var_models.sink_dims(parts.model.config)
    for tokens in one.encoded.features:
        found = sink_flags(tokens, dims, 2.5, torch.ones(576, dtype=torch.bool))
        assert int(found.sum()) == SINKS_PER_IMAGE


def test_a_prompt_with_text_between_its_pictures(parts: LMMParts) -> None:
    one = var_models.request(parts, 3, 5, 7, torch.device("cpu"), seed=0, between=2)
    assert one.ids.shape == (1, 5 + 3 * 576 + 2 * 2 + 7)
    assert one.first == 5 + 576
    columns = torch.nonzero(one.eligible(0, one.ids.shape[1])[0]).flatten().tolist()
    gaps = [5 + 576, 5 + 576 + 1, 5 + 2 * 576 + 2, 5 + 2 * 576 + 3]
    assert columns == [*gaps, *range(5 + 3 * 576 + 4, 5 + 3 * 576 + 11)]
    assert one.eligible(one.ids.shape[1], one.ids.shape[1] + 2).all()


@pytest.mark.parametrize("name", list(var_models.SHAPES))
def test_shapes_have_the_stated_heads(name: str) -> None:
    """On the meta device, so that 7B models cost nothing."""
    shape = var_models.SHAPES[name]
    with torch.device("meta"):
        model = var_models.LlavaForConditionalGeneration(shape.config())
    family = family_of(model)
    side = model.config.vision_config.image_size
    (visual,) = family.visuals({"pixel_values": torch.empty(1, 3, side, side, device="meta")})
    assert family.tokens_of(visual) == var_models.PER_IMAGE
    assert family.decoder.head_dim == 128
    layers, heads = {"mid": (8, 16), "llava-next-7b": (32, 32)}[name]
    assert (len(family.decoder.layers), family.decoder.heads) == (layers, heads)
    assert set(shape.layers) < set(range(layers))
    # The prompts of both lengths fit.
    assert family.max_context >= 35 + 5 * 576 + 60


@pytest.mark.parametrize(("images", "between"), [(1, 0), (2, 3)])
def test_eager_var_without_sinks_is_sdpa(parts: LMMParts, images: int, between: int) -> None:
    stock, mapped = var_models.twin(parts.model), var_models.twin(parts.model)
    subject = var_subject.Subject(TINY, parts, stock, mapped, images, 0, between)
    with torch.no_grad():
        logits = {}
        for name, threshold in (("none", 7.99), ("found", subject.threshold)):
            subject.eager.threshold = threshold
            logits[name] = subject._prefill(subject.ways[EAGER], keep=20).logits
        plain = subject._prefill(subject.ways[SDPA], keep=20).logits
        ours = subject._prefill(subject.ways[OURS], keep=20).logits
    torch.testing.assert_close(logits["none"], plain, atol=1e-4, rtol=0)
    assert (logits["found"] - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits["found"], ours, atol=1e-4, rtol=0)
    picked = subject._calls()["prefill"].picked
    assert (None if picked is None else len(picked)) == (3 + 60 if between else None)


@pytest.mark.slow
def test_a_small_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(var_models.SHAPES, "mid", TINY)
    out = tmp_path / "var.json"
    assert var_attention.main(["--repeats", "2", "--images", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    (one,) = result["prompts"]
    assert (one["tokens"], one["visual_tokens"]) == (671, 576)
    assert one["agreement"]["met"]
    assert one["agreement"]["prefill_to_sdpa"] > 1e-3
    changed = one["changed"]
    assert changed["visual_sinks_found"] == [SINKS_PER_IMAGE] * len(TINY.layers)
    assert changed["text_sinks_found"] == [1, 1]
    assert 0.1 < changed["rows_changed"] < 0.95
    for part in ("model", "attention"):
        for phase in PHASES:
            rows = one[part][phase]
            assert set(rows) == {SDPA, OURS, EAGER}
            assert rows[SDPA]["to_sdpa"]["of_medians"] == rows[SDPA]["peak_to_sdpa"] == 1.0
            assert len(rows[OURS]["runs_s"]) == 2
            assert rows[EAGER]["peak_bytes"] > rows[OURS]["peak_bytes"] or phase == "decode"
    assert any("scaled_dot_product" in name for name in one["kernels"][SDPA]["prefill"])
    assert len(result["targets"]) == 6
    for target in result["targets"]:
        assert target["met"] == (target["measured"] <= target["at_most"])
    assert "671 tokens" in capsys.readouterr().out


def test_targets_are_those_of_the_prompt() -> None:
    def figures(time: float, peak: float) -> dict[str, Any]:
        return {OURS: {"to_sdpa": {"of_medians": time}, "peak_to_sdpa": peak}}

    one = {
        "tokens": 2975,
        "images": 5,
        "model": {"prefill": figures(1.05, 1.2), "decode": figures(1.29, 1.0)},
        "attention": {"prefill": figures(1.11, 9.0), "decode": figures(1.31, 9.0)},
    }
    met = {target["what"]: target["met"] for target in var_attention._targets(one)}
    assert met == {
        "model prefill time / sdpa": True,
        "attention prefill time / sdpa": False,
        "model prefill peak memory / sdpa": False,
        "model decode time / sdpa": True,
        "attention decode time / sdpa": False,
        "model decode peak memory / sdpa": True,
    }


def test_disagreement_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"prompts": [{"tokens": 671, "agreement": {"met": False}}]}
    monkeypatch.setattr(var_attention, "measure", lambda options: wrong)
    monkeypatch.setattr(var_attention, "_report", lambda result: iter(()))
    assert var_attention.main([]) == 1
    assert "differ" in capsys.readouterr().err


HEAD = {
    "date": "2026-01-02 03:04 UTC",
    "versions": {"torch": "2.0"},
    "hardware": {"cpu": "A CPU", "cpu_capability": "AVX2"},
    "threads": 1,
}


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def way(seconds: float, ratio: float, mib: int) -> dict[str, Any]:
        to_sdpa = {"of_medians": ratio}
        return {"median_s": seconds, "to_sdpa": to_sdpa, "peak_bytes": mib * 2**20}

    ways = {SDPA: way(0.1, 1.0, 4), OURS: way(0.12, 1.2, 5), EAGER: way(0.4, 4.0, 64)}
    part = {"prefill": ways, "decode": ways}
    prompt = {
        "tokens": 2975,
        "visual_tokens": 2880,
        "text_between": 0,
        "changed": {"rows_changed": 0.401},
        "agreement": {"prefill_to_eager": 2.7e-6},
        "model": part,
        "attention": part,
    }
    words = {"model": "A model", "var_layers": [1, 2, 7], "dtype": "float32"}
    result = {**HEAD, **words, "prompts": [prompt]}
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    assert readme_tables.TABLES["var_attention"]() == ""
    (tmp_path / "var_attention.json").write_text(json.dumps(result))
    table = readme_tables.TABLES["var_attention"]()
    row = "100.00 | 120.00 (1.20x) | 400.00 (4.00x) | 4.00 | 5.00 | 64.00 |"
    assert f"| 2,975 | model, prefill | {row}" in table
    assert f"| 2,975 | attention, decode | {row}" in table
    assert "A model, VAR in layers 1 to 7; float32" in table
    assert "changes 40 % of the rows that it may change" in table
    assert "within 3e-06 of eager VAR's" in table
    assert "A CPU (AVX2), 1 thread(s), torch 2.0, 2026-01-02; from `var_attention.json`" in table
