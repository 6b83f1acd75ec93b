"""Pictures, prompts and tokens of original models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import (
    LlavaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip import CLIPImageProcessorPil

from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.original_llava import (
    load_original,
)
from mmlm_efficient.original_llava.processor import chat_template, original_tokenizer
from tests.original_llava.sources import (
    original_names,
    original_settings,
    source,
    tokenizer,
    write,
)
from tests.tiny import VOCAB, text_config
from tests.tiny_processor import picture


def expand_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize("size", [(40, 30), (31, 44), (24, 24)])
def test_pictures_of_llava_15_are_padded(good: Path, size: tuple[int, int]) -> None:
    _, processor = load_original(good)
    stock = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    image = picture(size=size)
    color = tuple(int(255 * value) for value in stock.image_mean)
    assert color == (122, 116, 104)
    got = processor.image_processor(image, return_tensors="np")["pixel_values"]
    expected = stock(expand_to_square(image, color), return_tensors="np")["pixel_values"]
    assert np.array_equal(got, expected)


def test_pictures_without_pad_are_cropped(good: Path) -> None:
    settings = json.loads((good / "config.json").read_text())
    del settings["image_aspect_ratio"]
    (good / "config.json").write_text(json.dumps(settings))
    _, processor = load_original(good)
    stock = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    got = processor.image_processor(picture(), return_tensors="np")["pixel_values"]
    assert np.array_equal(got, stock(picture(), return_tensors="np")["pixel_values"])


def test_of_two_equal_grids_the_first_of_the_original_is_taken(tmp_path: Path) -> None:
    """A small square picture fits 24 wide, 48 high as well as 48 wide, 24 high."""
    stock = source("next", "llama")
    folder = write(tmp_path, original_names(stock), original_settings(stock, "llava_llama"))
    model, processor = load_original(folder)
    square = Image.new("RGB", (20, 20), (255, 255, 255))
    crops = processor.image_processor(square, return_tensors="np")["pixel_values"][0]
    black = -np.array([0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    assert len(crops) == 3
    # The bars are above and below: the upper crop is black in its first row, not its first column.
    assert np.allclose(crops[1][:, 0, 12], black, atol=1e-4)
    assert not np.allclose(crops[1][:, 12, 0], black, atol=1e-1)
    assert model.config.image_grid_pinpoints == processor.image_processor.image_grid_pinpoints


def test_onevision_pictures(tmp_path: Path) -> None:
    stock = source("onevision", "qwen2")
    folder = write(tmp_path, original_names(stock), original_settings(stock, "llava_qwen"))
    _, processor = load_original(folder)
    white = Image.new("RGB", (24, 24), (255, 255, 255))
    crops = processor.image_processor(white, return_tensors="np")["pixel_values"][0]
    assert np.allclose(crops[0], 1.0)  # (1 - 0.5) / 0.5
    assert crops[0].shape == (3, 24, 24)


MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q1"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A1"}]},
    {"role": "user", "content": "Q2"},
]
SYSTEM = {"role": "system", "content": "S"}
VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. "
)


@pytest.mark.parametrize(
    ("model_type", "words", "prompt", "with_system"),
    [
        (
            "llava",
            [],
            VICUNA + "USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
            "S USER: Q2 ASSISTANT:",
        ),
        (
            "llava_mistral",
            [],
            "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]",
            "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ2 [/INST]",
        ),
        (
            "llava_llama",
            ["<|im_start|>", "<|im_end|>"],
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ1"
            "<|im_end|><|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2<|im_end|>"
            "<|im_start|>assistant\n",
            "<|im_start|>system\nS<|im_end|><|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n",
        ),
        (
            "llava_qwen",
            ["<|im_start|>", "<|im_end|>"],
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2"
            "<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_conversation_styles(
    model_type: str, words: list[str], prompt: str, with_system: str
) -> None:
    chosen = tokenizer(*words)
    chosen.add_tokens(["<image>"], special_tokens=True)
    chosen.chat_template = chat_template(model_type, chosen)
    write_it: Any = chosen.apply_chat_template
    options = {"tokenize": False, "add_generation_prompt": True}
    assert write_it(MESSAGES, **options) == prompt
    assert write_it([SYSTEM, MESSAGES[-1]], **options) == with_system


def test_conversation_style_that_is_not_supported() -> None:
    with pytest.raises(UnsupportedError, match="Llama 3"):
        chat_template("llava_llama", tokenizer("<|start_header_id|>"))


@pytest.mark.parametrize(("scheme", "between"), [("first", " \n"), ("always", "\n")])
def test_ids_after_an_image_are_those_of_the_original(scheme: str, between: str) -> None:
    """The original tokenizes what follows an image as a text of its own."""
    letters = ["<unk>", "▁", "\n", *"What"]
    inner = Tokenizer(BPE({x: i for i, x in enumerate(dict.fromkeys(letters))}, []))
    inner.pre_tokenizer = Metaspace(prepend_scheme=scheme, split=False)  # type: ignore[arg-type]
    chosen = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    chosen.add_tokens(["<image>"], special_tokens=True)
    assert ("'<image>" + between.replace("\n", "\\n") + "'") in chat_template("llava", chosen)
    image = chosen.convert_tokens_to_ids("<image>")
    ids = chosen.encode(f"<image>{between}What", add_special_tokens=False)
    assert ids[ids.index(image) + 1 :] == chosen.encode("\nWhat", add_special_tokens=False)


@pytest.fixture(scope="module", params=[True, False], ids=["space", "no space"])
def pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model that begins a text with a space, as Vicuna's, or not, as Yi's."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    (folder / "words.txt").write_text("What is shown in this picture? USER ASSISTANT\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        minloglevel=2,
    )
    return folder


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_ids_are_those_of_sentencepiece(
    pieces: Path, tmp_path: Path, text: str, legacy: bool | None
) -> None:
    """The original's slow tokenizer on each piece of the prompt between the images."""
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    settings |= {} if legacy is None else {"legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = LlavaConfig(text_config=text_config(text, vocab_size=310))
    chosen = original_tokenizer(tmp_path, config)
    chosen.chat_template = chat_template(f"llava_{text}", chosen)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    prompt = chosen.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    before, after = prompt.replace("<image> \n", "<image>\n").split("<image>")
    image = chosen.convert_tokens_to_ids("<image>")
    assert image == 310
    expected = [1, *reference.encode(before), image, *reference.encode(after)]
    assert chosen(prompt).input_ids == expected


def test_end_and_padding_tokens(tmp_path: Path) -> None:
    stock = source("llava", "llama")
    folder = write(tmp_path, original_names(stock), original_settings(stock, "llava_llama"))
    tokenizer("<|im_start|>", "<|im_end|>").save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    model, processor = load_original(folder)
    assert model.generation_config.eos_token_id == [2, 7, 10]
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") == 10
    assert processor.tokenizer.pad_token == "<unk>"
    assert model.generation_config.pad_token_id == 3


def test_sampled_new_rows_are_bounded() -> None:
    """The mean of the logits has at most the share of one token among the old ones."""
    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    new = 128 - VOCAB
    grown = torch.cat([logits, logits.mean(-1, keepdim=True).expand(-1, new)], -1)
    assert (grown.softmax(-1)[:, VOCAB:].sum(-1) < new / VOCAB).all()
    assert math.isclose(new / VOCAB, 31 / 97)
