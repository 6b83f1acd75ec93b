"""What a search is told apart by: pictures, questions and weights, not what is computed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmlm_efficient import load
from mmlm_efficient.calibration.data import Sample, find_samples
from mmlm_efficient.calibration.digests import samples_digest, weights_digest
from mmlm_efficient.calibration.vflowopt import model_inputs
from mmlm_efficient.errors import ModelLoadError
from tests import tiny
from tests.tiny_processor import save_tiny

IDS = [torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4]])]


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    for number in range(2):
        Image.new("RGB", (8, 4), (number, 0, 0)).save(tmp_path / f"p{number}.png")
    return [Sample(f"p{n}.png", f"is it {n}?", tmp_path / f"p{n}.png") for n in range(2)]


def test_the_same_pixels_and_questions_are_the_same(samples: list[Sample], tmp_path: Path) -> None:
    first = samples_digest(samples, IDS)
    assert len(first) == 16
    Image.new("RGB", (8, 4)).save(tmp_path / "moved.bmp")
    moved = replace(samples[0], name="other", source=tmp_path / "moved.bmp")
    assert samples_digest([moved, samples[1]], IDS) == first


def test_other_pictures_questions_order_or_prompts_are_others(
    samples: list[Sample], tmp_path: Path
) -> None:
    found = {samples_digest(samples, IDS), samples_digest(samples[::-1], IDS)}
    found.add(samples_digest(samples, [IDS[0], torch.tensor([[1, 5]])]))
    found.add(samples_digest([samples[0], replace(samples[1], question="is it 2?")], IDS))
    for name, size, color in (("c", (8, 4), (0, 0, 1)), ("s", (4, 8), (0, 0, 0))):
        Image.new("RGB", size, color).save(tmp_path / f"{name}.png")
        other = replace(samples[0], source=tmp_path / f"{name}.png")
        found.add(samples_digest([other, samples[1]], IDS))
    assert len(found) == 6


def test_neither_threads_nor_noise_nor_dtype_change_anything() -> None:
    samples, found = find_samples("pocket", 2), set()
    threads = torch.get_num_threads()
    try:
        for dtype, count in (("float32", 1), ("float32", 2), ("bfloat16", 1), ("float16", 1)):
            torch.set_num_threads(count)
            with load("pocket", dtype=dtype) as lmm:
                ids = [model_inputs(lmm, sample)["input_ids"] for sample in samples]
                found.add((samples_digest(samples, ids), weights_digest(lmm.model, lmm.name)))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_other_weights_in_a_folder_are_others(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    copied = shutil.copytree(folder, tmp_path / "copy")

    def digest(place: Path) -> str:
        with load(place) as lmm:
            return weights_digest(lmm.model, lmm.name)

    first = digest(folder)
    assert digest(copied) == first
    file = copied / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name] = tensors[name] * 1.5  # no sign changes, nor does the size of the file
    save_file(tensors, file, metadata={"format": "pt"})
    assert digest(copied) != first


def test_weights_changed_in_memory_are_others(tmp_path: Path) -> None:
    with load(save_tiny(tmp_path / "model")) as lmm:
        first = weights_digest(lmm.model, lmm.name)
        with torch.no_grad():
            lmm.model.lm_head.weight += 0.02 * torch.randn_like(lmm.model.lm_head.weight)
        assert weights_digest(lmm.model, lmm.name) != first


def test_weights_that_came_from_no_folder() -> None:
    model = tiny.tiny_llava()
    first = weights_digest(model, "LlavaForConditionalGeneration")
    assert weights_digest(tiny.tiny_llava(), "another name") == first
    assert weights_digest(tiny.tiny_llava(seed=1), "another name") != first
    with torch.no_grad():
        model.model.language_model.norm.weight *= 1.5
    assert weights_digest(model, "LlavaForConditionalGeneration") != first


def test_a_weight_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelLoadError, match=r"model.safetensors: cannot be read"):
        weights_digest(tiny.tiny_llava(), str(tmp_path))
