"""A tiny processor and a complete tiny model folder for tests: no network, nothing shipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip import CLIPImageProcessorPil

from tests.tiny import IMAGE_SIZE, IMAGE_TOKEN, PATCH, VOCAB, tiny_llava

# LLaVA-1.5's own layout, one message after the other.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role.upper() }} "
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token: the special ids of `tests.tiny`, a few words, then w10, w11, ..."""
    words = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "USER", "ASSISTANT", "where", "cat", "?"]
    words += [f"w{number}" for number in range(len(words), VOCAB)]
    vocab = {word: number for number, word in enumerate(words)}
    assert vocab["<image>"] == IMAGE_TOKEN
    inner = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def tiny_processor() -> LlavaProcessor:
    """A LlavaProcessor for `tests.tiny.tiny_llava()`."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        ),
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny(folder: Path, **options: object) -> Path:
    """Write a complete model folder, as `from_pretrained` reads it."""
    tiny_llava(**options).save_pretrained(folder)  # type: ignore[arg-type]
    tiny_processor().save_pretrained(folder)
    return folder


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A random RGB picture."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
