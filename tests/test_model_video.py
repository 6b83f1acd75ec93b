"""Questions about videos: the model inputs are those of transformers, in every family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmlm_efficient import EfficientLMM, FrameSampling, Request, load_video
from mmlm_efficient.errors import MediaError, PromptError, SettingsError, UnsupportedError
from mmlm_efficient.prompts import preprocess, write_prompt
from tests import tiny_families
from tests.clips import pictures, write_clip
from tests.tiny import IMAGE_TOKEN, tiny_llava
from tests.tiny_families import BEGIN, END, IMAGE, QWEN, VIDEO, WITH_VIDEO, tiny_model
from tests.tiny_processor import picture
from tests.tiny_processor import tiny_processor as llava_processor

QUESTION = "w20 w21"
MEAN = np.asarray([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.asarray([0.26862954, 0.26130258, 0.27577711], np.float32)


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, EfficientLMM]]:
    made = {
        family: EfficientLMM(tiny_model(family), tiny_families.tiny_processor(family))
        for family in tiny_families.FAMILIES
    }
    made["llava"] = EfficientLMM(tiny_llava(), llava_processor())
    yield made
    for lmm in made.values():
        lmm.close()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 40)


def inputs_of(lmm: EfficientLMM, *requests: Any, **options: Any) -> dict[str, Any]:
    family = lmm._parts.family
    return dict(preprocess(lmm.processor, requests, torch.float32, family, **options))


def normalised(frame: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A frame of (width, height) pixels as [3, height, width]."""
    pixels = np.asarray(frame.resize(size, Image.Resampling.BICUBIC), np.float32) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


# What the model gets


def test_onevision_stretches_every_frame(models: dict[str, EfficientLMM]) -> None:
    frames = pictures(3)
    inputs = inputs_of(models["llava_onevision"], Request(QUESTION, video=frames))
    expected = np.stack([normalised(frame, (20, 20)) for frame in frames])
    assert inputs["pixel_values_videos"].shape == (1, 3, 3, 20, 20)
    assert np.abs(inputs["pixel_values_videos"][0].numpy() - expected).max() < 1e-5
    # 5 x 5 patches are pooled to 3 x 3; one newline.
    assert inputs["input_ids"].tolist() == [[*[VIDEO] * (3 * 9 + 1), 20, 21, 9]]
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values_videos"}


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("count", [4, 5])
def test_qwen_patches_join_pairs_of_frames(
    models: dict[str, EfficientLMM], family: str, count: int
) -> None:
    frames = pictures(count, (50, 37))
    video = load_video(frames, fps=4)
    inputs = inputs_of(models[family], Request(QUESTION, video=video))
    # 37 x 50 pixels are rounded to multiples of two patches of 4 pixels.
    pixels = [normalised(frame, (48, 40)) for frame in frames]
    pixels += pixels[-1:] * (count % 2)
    steps, rows, cols = len(pixels) // 2, 10, 12
    assert inputs["video_grid_thw"].tolist() == [[steps, rows, cols]]
    expected = [
        np.stack(
            [
                pixels[2 * step + time][:, row * 4 : row * 4 + 4, col * 4 : col * 4 + 4]
                for time in (0, 1)
            ],
            axis=1,
        ).ravel()
        for step in range(steps)
        for top in range(0, rows, 2)
        for left in range(0, cols, 2)
        for row in (top, top + 1)
        for col in (left, left + 1)
    ]
    assert np.abs(inputs["pixel_values_videos"].numpy() - np.stack(expected)).max() < 1e-5
    block = [VIDEO] * (steps * rows * cols // 4)
    assert inputs["input_ids"].tolist() == [[BEGIN, *block, END, 20, 21, 9]]
    assert inputs["mm_token_type_ids"].tolist() == [[0, *[2] * len(block), 0, 0, 0, 0]]
    if family == "qwen2_5_vl":
        assert inputs["second_per_grid_ts"].tolist() == [0.5]


def test_seconds_come_from_the_frames_that_were_picked(
    models: dict[str, EfficientLMM], clip: Path
) -> None:
    lmm = models["qwen2_5_vl"]
    sampling = FrameSampling(frames=8)
    inputs = inputs_of(lmm, Request(QUESTION, video=clip), sampling=sampling)
    # 8 of 40 frames at 10 per second are 2 per second.
    assert inputs["second_per_grid_ts"].tolist() == [1.0]
    assert inputs["second_per_grid_ts"].dtype == torch.float32
    half = preprocess(
        lmm.processor, [Request(QUESTION, video=clip)], torch.bfloat16, lmm._parts.family, sampling
    )
    assert half["pixel_values_videos"].dtype == torch.bfloat16
    assert half["second_per_grid_ts"].dtype == torch.float32


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_frames_are_images_where_there_is_no_input_for_videos(
    models: dict[str, EfficientLMM], family: str
) -> None:
    lmm, frames = models[family], pictures(3)
    as_video = inputs_of(lmm, Request(QUESTION, video=frames))
    as_images = inputs_of(lmm, (QUESTION, frames))
    assert as_video.keys() == as_images.keys()
    for name, value in as_video.items():
        assert torch.equal(value, as_images[name]), name
    answer = lmm.ask(QUESTION, video=frames, methods="random:0.5", max_new_tokens=2)
    assert len(answer.report.images) == 3


def test_settings_for_videos_differ_from_those_for_pictures(
    models: dict[str, EfficientLMM],
) -> None:
    given = Request(QUESTION, video=pictures(2))
    family = models["qwen2_vl"]._parts.family
    for name, value in (
        ("video_settings", {"size": {"shortest_edge": 64, "longest_edge": 16 * 16}}),
        ("video_settings", {"size": {"longest_edge": 16 * 16}}),
        (
            "video_processor",
            SimpleNamespace(size={"shortest_edge": 64, "longest_edge": 256}, patch_size=4),
        ),
    ):
        processor = tiny_families.tiny_processor("qwen2_vl")
        setattr(processor, name, value)
        inputs = preprocess(processor, [given], torch.float32, family)
        (grid,) = inputs["video_grid_thw"].tolist()
        assert grid[1] * grid[2] * 16 <= 256
        assert getattr(processor, name) is value


def test_the_processor_stays_as_it_is(models: dict[str, EfficientLMM]) -> None:
    before = dict(vars(models["qwen2_vl"].processor))
    inputs_of(models["qwen2_vl"], Request(QUESTION, video=pictures(2)))
    assert vars(models["qwen2_vl"].processor) == before


def test_only_a_picture_alone_in_its_prompt_has_tiles(models: dict[str, EfficientLMM]) -> None:
    inputs = inputs_of(
        models["llava_onevision"],
        (QUESTION, [picture(), picture(1)]),
        (QUESTION, None),
        (QUESTION, picture(2)),
    )
    assert inputs["batch_num_images"].tolist() == [2, 1]
    counts = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    assert counts[:2] == [2 * 26, 0]
    assert counts[2] > 26


# Answers


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_with_nothing_to_prune_ask_is_stock_transformers(
    models: dict[str, EfficientLMM], family: str
) -> None:
    lmm, request = models[family], Request(QUESTION, video=pictures(5))
    inputs = inputs_of(lmm, request)
    stock = lmm.model.generate(**inputs, max_new_tokens=6)
    answer = lmm.ask(QUESTION, video=request.video, max_new_tokens=6)
    new = stock[0, inputs["input_ids"].shape[1] :]
    assert answer.text == lmm.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    n_tokens = int((inputs["input_ids"] == VIDEO).sum())
    assert answer.usage.visual_tokens_in == n_tokens
    (report,) = answer.report.images
    assert report.places is not None
    assert report.places.video


@pytest.mark.parametrize("family", WITH_VIDEO)
@pytest.mark.parametrize("method", ["flowcut:9", "random:9"])
def test_videos_are_pruned(models: dict[str, EfficientLMM], family: str, method: str) -> None:
    options: dict[str, Any] = {"methods": method, "max_new_tokens": 4}
    answer = models[family].ask(QUESTION, video=pictures(4), **options)
    assert answer.usage.visual_tokens_kept["layer"] < answer.usage.visual_tokens_in / 2
    stream = models[family].stream(QUESTION, video=pictures(4), **options)
    assert "".join(stream) == answer.text


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_a_batch_of_pictures_videos_and_text(models: dict[str, EfficientLMM], family: str) -> None:
    lmm, frames = models[family], pictures(4)
    requests = [
        Request(QUESTION, video=frames),
        (QUESTION, picture()),
        Request("w30 w31 w32", picture(1), frames[::-1]),
        ("w40", None),
    ]
    batch = lmm.ask_batch(requests, "uniform:0.5", 5)
    for one, answer in zip(requests, batch, strict=True):
        alone = lmm.ask_batch([one], "uniform:0.5", 5)[0]
        assert answer.text == alone.text
        assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
        kept = [image.kept.tolist() for image in answer.report.images]
        assert kept == [image.kept.tolist() for image in alone.report.images]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "llava"])
def test_every_form_of_a_video(models: dict[str, EfficientLMM], family: str, clip: Path) -> None:
    lmm, sampling = models[family], FrameSampling(frames=4)
    video = load_video(clip, sampling)
    texts = {
        lmm.ask(QUESTION, video=source, sampling=sampling, max_new_tokens=4).text
        for source in (clip, str(clip), clip.read_bytes(), video)
    }
    assert len(texts) == 1
    answer = lmm.ask(QUESTION, video=video, max_new_tokens=1)
    as_list = lmm.ask(QUESTION, video=video.frames, max_new_tokens=1)
    assert as_list.usage.visual_tokens_in == answer.usage.visual_tokens_in


@pytest.mark.parametrize(("family", "frames"), [("llava_onevision", 32), ("llava", 8)])
def test_frames_that_are_taken_when_the_request_does_not_say(
    models: dict[str, EfficientLMM], clip: Path, family: str, frames: int
) -> None:
    lmm = models[family]
    assert lmm.sampling == FrameSampling(frames=frames)
    inputs = inputs_of(lmm, Request(QUESTION, video=clip))
    pixels = inputs.get("pixel_values_videos", inputs.get("pixel_values"))
    assert isinstance(pixels, Tensor)
    assert frames in pixels.shape[:2]


# Prompts


def test_the_video_goes_where_the_question_says(models: dict[str, EfficientLMM]) -> None:
    lmm, video = models["llava_onevision"], pictures(1)
    ids = inputs_of(lmm, Request("w20 <video> w21 <image> w22", picture(), video))["input_ids"]
    words = [token for token in ids[0].tolist() if token not in (IMAGE, VIDEO)]
    assert words == [20, 21, 22, 9]
    kinds = [token for token in ids[0].unique_consecutive().tolist() if token in (IMAGE, VIDEO)]
    assert kinds == [VIDEO, IMAGE]
    # A model without such a token reads the same word.
    llava = models["llava"]
    ids = inputs_of(llava, Request("where <video> cat ?", video=pictures(2)))["input_ids"][0]
    assert ids.unique_consecutive().tolist() == [1, 5, 7, IMAGE_TOKEN, 8, 9, 6]
    assert int((ids == IMAGE_TOKEN).sum()) == 2 * 36
    # Without a video it is a word as any other.
    assert "<video>" in write_prompt(llava.processor, "where <video> cat ?", 0)


def test_template_that_knows_videos() -> None:
    processor = tiny_families.tiny_processor("qwen2_vl")
    unaware = write_prompt(processor, QUESTION, 1, video=True)
    processor.chat_template = processor.chat_template.replace(
        "{% else %}",
        "{% elif part.type == 'video' %}<begin> <video> <end> {% else %}",
        1,
    )
    assert write_prompt(processor, QUESTION, 1, video=True) == unaware
    assert unaware.split() == [
        *("<begin>", "<image>", "<end>", "<begin>", "<video>", "<end>", "w20", "w21", "w9")
    ]
    processor.chat_template = "nothing is shown"
    with pytest.raises(PromptError, match="shows neither videos nor images"):
        write_prompt(processor, QUESTION, 0, video=True)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("<video> <video> w20", r"holds 2 <video>, but 1 video\(s\)"),
        ("<video>", "question: is empty"),
        ("<image> w20", r"holds 1 <image>, but 0 image\(s\)"),
    ],
)
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_placeholders_that_do_not_match(
    models: dict[str, EfficientLMM], family: str, question: str, message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        models[family].ask(question, video=pictures(2))


def test_video_placeholder_without_a_video(models: dict[str, EfficientLMM]) -> None:
    with pytest.raises(PromptError, match=r"holds 1 <video>, but 0 video\(s\)"):
        models["qwen2_vl"].ask("<video> w20")


# Errors


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_image_and_video_where_frames_are_images(
    models: dict[str, EfficientLMM], family: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"image and video.*'{family}'.*Give one of them"):
        models[family].ask(QUESTION, picture(), video=pictures(2))
    # An empty list is no image.
    assert models[family].ask(QUESTION, [], video=pictures(2), max_new_tokens=1).text


def test_too_many_frames_for_the_context() -> None:
    text = {"max_position_embeddings": 100}
    with (
        EfficientLMM(tiny_llava(language=text), llava_processor()) as small,
        pytest.raises(PromptError) as caught,
    ):
        small.ask("where cat ?", video=pictures(4))
    message = str(caught.value)
    assert "takes 150 positions, but the model's context has 100" in message
    assert "4 frames make 144 visual tokens before pruning" in message
    assert "sampling=FrameSampling(frames=2)" in message


def test_videos_of_a_batch_with_different_numbers_of_frames(
    models: dict[str, EfficientLMM],
) -> None:
    requests = [Request(QUESTION, video=pictures(count)) for count in (2, 3)]
    with pytest.raises(PromptError, match=r"have 2, 3 frames.*one by one"):
        models["llava_onevision"].ask_batch(requests)
    assert len(models["qwen2_vl"].ask_batch(requests, max_new_tokens=1)) == 2


def test_bad_videos(models: dict[str, EfficientLMM], tmp_path: Path) -> None:
    lmm = models["llava_onevision"]
    for source, message in (
        (tmp_path / "gone.mp4", r"gone\.mp4: no such file"),
        (b"", "is empty"),
        ([], "list of frames is empty"),
        (picture(), "one picture"),
        (3, "cannot read a int"),
    ):
        with pytest.raises(MediaError, match=message):
            lmm.ask(QUESTION, video=source)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="expected a FrameSampling, got 16"):
        lmm.ask(QUESTION, video=pictures(2), sampling=16)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=r"requests\[0\]: expected a pair.*or a Request"):
        lmm.ask_batch([(QUESTION, None, pictures(2))])  # type: ignore[list-item]


def test_a_video_needs_its_family() -> None:
    with pytest.raises(PromptError, match="family of the model"):
        preprocess(llava_processor(), [Request(QUESTION, video=pictures(1))], torch.float32)
