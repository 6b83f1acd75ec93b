"""The processor of an original LLaVA checkpoint, which stores none: built from known values.

The prompts are those of the original ``conversation.py``: "v1" for Vicuna, "mistral_instruct",
"chatml_direct" for the 34B model and "qwen_1_5" for OneVision. The image processors are those that
work on PIL images, so torchvision is not needed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AddedToken,
    AutoTokenizer,
    LlamaConfig,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from mmlm_efficient.errors import ModelLoadError, UnsupportedError

IMAGE = "<image>"
VIDEO = "<video>"
IM_END = "<|im_end|>"

# What the original normalizes by, and fills the padding of "pad" with.
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
SIGLIP_MEAN = SIGLIP_STD = [0.5, 0.5, 0.5]

# One message in words: its texts, and IMAGE with what follows it where the image is.
_SAY = (
    "{%- macro say(message) -%}{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
V1 = _SAY + (
    "{%- if messages[0]['role'] != 'system' -%}{{ 'A chat between a curious human and an "
    "artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers "
    "to the human\\'s questions. ' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ say(message) + ' ' }}"
    "{%- elif message['role'] == 'user' -%}{{ 'USER: ' + say(message) + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' + say(message) + '</s>' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
MISTRAL_INSTRUCT = _SAY + (
    "{%- set state = namespace(system='') -%}{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set state.system = '<<SYS>>\\n' + say(message) + '\\n<</SYS>>\\n\\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ '[INST] ' + state.system + say(message) + ' [/INST]' }}{%- set state.system = '' -%}"
    "{%- else -%}{{ ' ' + say(message) + ' </s>' }}{%- endif -%}{%- endfor -%}"
)


def _chatml(system: str, after: str) -> str:
    """The ChatML template with a default system message and what follows each end token."""
    end = f"'<|im_end|>{after}'"
    return _SAY + (
        "{%- if messages[0]['role'] != 'system' -%}"
        f"{{{{ '<|im_start|>system\\n{system}' + {end} }}}}{{%- endif -%}}"
        "{%- for message in messages -%}"
        f"{{{{ '<|im_start|>' + message['role'] + '\\n' + say(message) + {end} }}}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}"
        "{%- endif -%}"
    )


CHATML_DIRECT = _chatml("Answer the questions.", "")
QWEN = _chatml("You are a helpful assistant.", "\\n")


class OnevisionProcessor(LlavaOnevisionProcessor):
    """A LlavaOnevisionProcessor for pictures and text.

    The video processor of transformers needs torchvision, and the original class needs the video
    processor.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        vision_aspect_ratio: str = "anyres_max_9",
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token, self.video_token = IMAGE, VIDEO
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        self.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO)
        self.vision_aspect_ratio = vision_aspect_ratio
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def original_tokenizer(folder: Path, config: PreTrainedConfig) -> Any:
    """The folder's tokenizer with an image token (OneVision: a video token too) and a pad token.

    Raises:
        ModelLoadError: it cannot be read, or a package that reads it is missing.
    """
    # The folder's own config has a type that transformers does not know.
    text = config.get_text_config()
    options: dict[str, Any] = {}
    names = {file.name for file in folder.iterdir()}
    read: Any = AutoTokenizer.from_pretrained
    try:
        if "tokenizer.json" not in names and "tokenizer.model" in names:
            options["add_prefix_space"] = _begins_with_space(folder)
            # For Mistral's it would take a class that never begins a text with a space.
            text = LlamaConfig() if text.model_type == "mistral" else text
        tokenizer = read(folder, config=text, local_files_only=True, **options)
    except ModelLoadError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise ModelLoadError(f"the tokenizer in {folder} cannot be read: {error}") from error
    tokens = [IMAGE, VIDEO] if config.model_type == "llava_onevision" else [IMAGE]
    known = tokenizer.get_vocab()
    for token in tokens:
        if token not in known:
            added = AddedToken(token, special=True, normalized=False)
            tokenizer.add_tokens([added], special_tokens=True)
    if tokenizer.pad_token is None:  # as the original code does
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _begins_with_space(folder: Path) -> bool:
    """Whether tokenizer.model writes a space before a text: Vicuna's and Mistral's do, Yi's not."""
    packages = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    absent = [pip for module, pip in packages.items() if not _installed(module)]
    if absent:
        raise ModelLoadError(
            f"{folder}: its tokenizer.model is read by packages that are not installed. "
            f"Install them with: pip install {' '.join(absent)}"
        )
    reader: Any = importlib.import_module("sentencepiece")
    pieces = reader.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return str(pieces.encode("a", out_type=str)[0]).startswith("▁")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that holds the module
        return False


def chat_end(tokenizer: Any) -> int | None:
    """The id of ChatML's end token; None for a tokenizer without it."""
    found = tokenizer.get_vocab().get(IM_END)
    return None if found is None else int(found)


def chat_template(model_type: str, tokenizer: Any) -> str:
    """The template of the conversation style that the checkpoint was trained with.

    Args:
        model_type: of the original config.
        tokenizer: with the image token.

    Raises:
        UnsupportedError: Llama 3, whose conversation style is another one.
    """
    known = tokenizer.get_vocab()
    if "<|start_header_id|>" in known:
        raise UnsupportedError(
            "the tokenizer is that of Llama 3, whose conversation style is not supported; "
            "supported: Vicuna, Mistral and ChatML."
        )
    if model_type == "llava_mistral":
        template = MISTRAL_INSTRUCT
    elif model_type == "llava_qwen":
        template = QWEN
    else:
        template = CHATML_DIRECT if IM_END in known else V1
    return template.replace("<image>\\n", IMAGE + _after_image(tokenizer).replace("\n", "\\n"))


def _after_image(tokenizer: Any) -> str:
    r"""What to write after an image so that the ids are those of the original: "\n" or " \n".

    The original cuts the prompt at its images and tokenizes the pieces one by one: the piece
    "\nWhat" then begins a text, and a SentencePiece tokenizer begins a text with a space. Behind
    an image token of the vocabulary some of them do not.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    wanted = ids("\nWhat")
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    for between in ("\n", " \n"):
        found = ids(f"{IMAGE}{between}What")
        if found[found.index(image) + 1 :] == wanted:
            return between
    return "\n"


def original_processor(raw: Mapping[str, Any], config: PreTrainedConfig, tokenizer: Any) -> Any:
    """The processor of transformers for a converted model.

    Args:
        raw: the original config.
        config: the converted one.
        tokenizer: with the image token.
    """
    vision: Any = config.vision_config
    siglip = vision.model_type == "siglip_vision_model"
    size = int(vision.image_size)
    square = {"height": size, "width": size}
    images: dict[str, Any] = {
        "image_mean": SIGLIP_MEAN if siglip else CLIP_MEAN,
        "image_std": SIGLIP_STD if siglip else CLIP_STD,
        # The original stretches a picture for SigLIP, and crops its middle for CLIP.
        "size": square if siglip else {"shortest_edge": size},
        "crop_size": square,
        "do_center_crop": not siglip,
    }
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "chat_template": chat_template(str(raw["model_type"]), tokenizer),
    }
    if config.model_type == "llava_onevision":
        images |= {"image_grid_pinpoints": config.image_grid_pinpoints, "crop_size": None}
        grid = size // int(vision.patch_size)
        return OnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessorPil(**images),
            num_image_tokens=grid * grid,
            vision_aspect_ratio=config.vision_aspect_ratio,
            **options,
        )
    options |= {
        "patch_size": int(vision.patch_size),
        "num_additional_image_tokens": int(not siglip),
    }
    if config.model_type == "llava_next":
        images["image_grid_pinpoints"] = config.image_grid_pinpoints
        return LlavaNextProcessor(image_processor=LlavaNextImageProcessorPil(**images), **options)
    pad = raw.get("image_aspect_ratio") == "pad"
    return LlavaProcessor(image_processor=LlavaImageProcessorPil(**images, do_pad=pad), **options)
