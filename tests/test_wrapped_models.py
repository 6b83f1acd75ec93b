"""Models that other people wrapped: off-loaded, split, compiled, with adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn

from mmlm_efficient import EfficientLMM, FastV
from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.families.wrapped import input_device
from mmlm_efficient.sinks.var import VAR
from tests import tiny, tiny_families
from tests.tiny_processor import picture, tiny_processor

METHODS: list[Any] = [
    (),
    "flowcut:9",
    [FastV(keep_tokens=9, layer=1), VAR(sink_dims=[3], sink_threshold=1.5, layers=[2])],
]
PROMPT = tiny.batch([tiny.prompt(1, tiny.IMAGE_TOKEN, 8, 9)], tiny.images(1))


class Wrapper(nn.Module):
    """What many training scripts have: a model inside, everything passed on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        inner: Any = self.inner
        return inner.generate(*args, **kwargs)


def offloaded(model: Any, _: Path) -> Any:
    return accelerate.cpu_offload(model)


def on_disk(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, str(folder))


def split(model: Any, folder: Path) -> Any:
    parts = ("vision_tower", "multi_modal_projector", "language_model", "image_newline")
    have = [f"model.{name}" for name in parts if hasattr(model.model, name)]
    devices = {**dict.fromkeys(have, "disk"), "model.vision_tower": "cpu", "lm_head": "cpu"}
    return accelerate.dispatch_model(
        model, devices, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


def compiled(model: Any, _: Path) -> Any:
    return torch.compile(model, backend="eager")


def inside_a_module(model: Any, _: Path) -> Any:
    return Wrapper(model)


WRAPPINGS = [offloaded, on_disk, split, inside_a_module]


@pytest.fixture(autouse=True)
def _compiled_code_is_forgotten() -> Iterator[None]:
    yield
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("wrapping", [*WRAPPINGS, compiled])
def test_a_wrapped_model_answers_as_the_model_does(wrapping: Any, tmp_path: Path) -> None:
    plain = EfficientLMM(tiny.tiny_llava(), tiny_processor())
    lmm = EfficientLMM(wrapping(tiny.tiny_llava(), tmp_path), tiny_processor())
    asked: Any = ("where cat ?", picture(0))
    for methods in METHODS:
        options: dict[str, Any] = {"methods": methods, "max_new_tokens": 3}
        want = plain.generate(**PROMPT, **options)
        assert torch.equal(lmm.generate(**PROMPT, **options), want)
        assert lmm.ask(*asked, **options).text == plain.ask(*asked, **options).text
        if wrapping is not compiled:  # tests/stations/test_hooks.py does
            logits = lmm.forward(**PROMPT, methods=methods).logits
            assert torch.equal(logits, plain.forward(**PROMPT, methods=methods).logits)


@torch.no_grad()
@pytest.mark.parametrize("wrapping", [offloaded, split])
@pytest.mark.parametrize("family", tiny_families.LLAVA)
def test_parameters_that_are_elsewhere(family: str, wrapping: Any, tmp_path: Path) -> None:
    """Newlines are a parameter of the model itself, which no module of its own brings along."""
    processor = tiny_families.tiny_processor(family)
    inputs = tiny_families.sample_inputs(family, "one")
    plain = EfficientLMM(tiny_families.tiny_model(family), processor)
    lmm = EfficientLMM(wrapping(tiny_families.tiny_model(family), tmp_path), processor)
    for methods in ((), "flowcut:0.5", "divprune:0.5", FastV(keep_ratio=0.5, layer=1)):
        want = plain.forward(**inputs, methods=methods).logits
        assert torch.equal(lmm.forward(**inputs, methods=methods).logits, want)


# Adapters


@torch.no_grad()
def test_a_model_with_lora() -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    adapted = get_peft_model(tiny.tiny_llava(), config)
    lmm = EfficientLMM(adapted, tiny_processor())
    assert lmm.parts.family.name == "llava"
    plain = EfficientLMM(tiny.tiny_llava(), tiny_processor())
    logits = []
    for methods in METHODS:
        ours = lmm.forward(**PROMPT, methods=methods).logits
        logits.append(ours)
        with adapted.disable_adapter():
            without = lmm.forward(**PROMPT, methods=methods).logits
        assert torch.equal(without, plain.forward(**PROMPT, methods=methods).logits)
        assert not torch.allclose(ours, without, atol=1e-2)
    stock = adapted.generate(**PROMPT, max_new_tokens=3)
    assert torch.equal(lmm.generate(**PROMPT, methods=(), max_new_tokens=3), stock)
    lmm.close()
    with EfficientLMM(adapted.merge_and_unload(), tiny_processor()) as merged:
        for methods, want in zip(METHODS, logits, strict=True):
            got = merged.forward(**PROMPT, methods=methods).logits
            assert got.shape == want.shape
            assert torch.allclose(got, want, atol=1e-3)


def test_learnt_prompts_are_refused() -> None:
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    with pytest.raises(UnsupportedError, match="PromptTuningConfig: puts learnt tokens before"):
        EfficientLMM(get_peft_model(tiny.tiny_llava(), config), tiny_processor())


def test_a_wrapper_that_cannot_generate_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"DataParallel: has no generate\(\). Give the Llava"
    ):
        EfficientLMM(nn.DataParallel(tiny.tiny_llava()), tiny_processor())
    proxy = SimpleNamespace(config=tiny.tiny_llava().config)
    with pytest.raises(UnsupportedError, match="SimpleNamespace: is no module of torch"):
        EfficientLMM(proxy, tiny_processor())
    with pytest.raises(UnsupportedError, match="belongs to no supported model family"):
        EfficientLMM(nn.Linear(1, 1), tiny_processor())


# Devices and dtypes


def test_where_inputs_belong(tmp_path: Path) -> None:
    assert input_device(tiny.tiny_llava()) == torch.device("cpu")
    for wrapping in (offloaded, on_disk, split):
        model = wrapping(tiny.tiny_llava(), tmp_path)
        assert any(weight.is_meta for weight in model.parameters())
        assert input_device(model) == torch.device("cpu")


def test_a_model_without_weights_is_refused() -> None:
    model = tiny.tiny_llava().to("meta")
    with pytest.raises(UnsupportedError, match="its weights are on the meta device"):
        EfficientLMM(model, tiny_processor())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", *tiny_families.FAMILIES])
def test_torchs_default_dtype_changes_nothing(family: str) -> None:
    if family == "llava":
        model, inputs = tiny.tiny_llava(), dict(PROMPT)
        processor = tiny_processor()
    else:
        model = tiny_families.tiny_model(family)
        inputs = tiny_families.sample_inputs(family, "several")
        processor = tiny_families.tiny_processor(family)
    with EfficientLMM(model, processor) as lmm:
        for name in ("flowcut", "vflowopt", "visionzip", "vispruner", "divprune", "sparsevlm"):
            want = lmm.forward(**inputs, methods=f"{name}:0.5").logits
            torch.set_default_dtype(torch.bfloat16)
            try:
                got = lmm.forward(**inputs, methods=f"{name}:0.5").logits
            finally:
                torch.set_default_dtype(torch.float32)
            assert got.dtype == torch.float32
            assert torch.equal(got, want), name


@torch.no_grad()
def test_a_stream_runs_under_the_autocast_of_whoever_asks() -> None:
    with EfficientLMM(tiny.tiny_llava(), tiny_processor()) as lmm:
        seen: list[torch.dtype] = []
        lmm.model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
        asked: Any = ("where cat ?", picture(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            want = lmm.ask(*asked, max_new_tokens=4).text
            stream = lmm.stream(*asked, max_new_tokens=4)
        assert "".join(stream) == want
        assert set(seen) == {torch.bfloat16}
        seen.clear()
        "".join(lmm.stream(*asked, max_new_tokens=2))
        assert set(seen) == {torch.float32}
