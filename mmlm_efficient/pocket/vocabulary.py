"""Pocket's tokenizer, chat template and processor, built from its own small English."""

from __future__ import annotations

import re
import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from mmlm_efficient.pocket.objects import NAMES, PLURALS
from mmlm_efficient.pocket.questions import PHRASINGS
from mmlm_efficient.pocket.scenes import IMAGE_PX, PATCH_PX

PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "<user>",
    "<assistant>",
)
SPECIALS = (PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

# words of answers and of questions that people are likely to add
_MORE_WORDS = """
yes no nothing left right above below top bottom center middle s second seconds frame frames
video time image picture object objects a an the of in on at is are what which where when how
many much who it this that there here and or to with for you me please tell show find color
red green blue yellow black white big small next near between before after last first same
box mask segment click positive negative point points done up down side corner
"""


def words() -> list[str]:
    """Every whole word of the vocabulary, in a fixed order."""
    found: dict[str, None] = {}
    for phrasing in (p for group in PHRASINGS.values() for p in group):
        for word in re.findall(r"[a-z]+", re.sub(r"\{.*?\}", " ", phrasing)):
            found.setdefault(word)
    for word in (*NAMES, *PLURALS.values(), *_MORE_WORDS.split()):
        found.setdefault(word)
    for number in range(100):
        found.setdefault(str(number))
    return list(found)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast word-piece tokenizer: known words are one token, others are spelt out."""
    letters = string.ascii_lowercase + string.digits
    pieces = [*SPECIALS, *words(), *string.punctuation]
    pieces += [c for c in letters if c not in pieces] + [f"##{c}" for c in letters]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side="left",
        model_max_length=8192,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_processor() -> LlavaProcessor:
    """Tokenizer and image processor: any picture is resized to 192 x 192 px, without cropping."""
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_PX, "width": IMAGE_PX},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
