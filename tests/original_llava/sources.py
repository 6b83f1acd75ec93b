"""Original LLaVA folders made of tiny models, for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from tests.tiny import VOCAB, text_config
from tests.tiny_processor import picture

CLIP = "openai/clip-vit-large-patch14-336"
SIGLIP = "google/siglip-so400m-patch14-384"
SPARE = VOCAB - 1  # the image token of the source models; no text uses it
QUESTION = "where cat ?"
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24]]


def tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """VOCAB words, one token each, and no image token."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "USER:", "ASSISTANT:", "where", "cat", "?", *more]
    words += [f"w{number}" for number in range(len(words), VOCAB)]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tower(kind: str, layers: int) -> Any:
    """A tower with heads as wide as those of the towers that are known by name."""
    sizes = {"num_hidden_layers": layers, "intermediate_size": 48, "image_size": 24}
    sizes |= {"patch_size": 4, "num_attention_heads": 2}
    if kind == "siglip":
        return SiglipVisionConfig(hidden_size=144, vision_use_head=False, **sizes)  # type: ignore[arg-type]
    return CLIPVisionConfig(hidden_size=128, **sizes)  # type: ignore[arg-type]


def source(family: str, text: str, **language: Any) -> Any:
    """A random model of transformers in eval mode."""
    shared: dict[str, Any] = {
        "vision_config": tower("siglip" if family == "onevision" else "clip", 5),
        "text_config": text_config(text, layers=2, **language),
        "image_token_index": SPARE,
    }
    torch.manual_seed(0)
    if family == "llava":
        return LlavaForConditionalGeneration(LlavaConfig(**shared)).eval()
    # transformers counts (height, width), the original (width, height).
    shared["image_grid_pinpoints"] = [[height, width] for width, height in PINPOINTS]
    if family == "next":
        return LlavaNextForConditionalGeneration(LlavaNextConfig(**shared)).eval()
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            **shared, video_token_index=SPARE - 1, vision_aspect_ratio="anyres_max_4"
        )
    ).eval()


def original_names(model: Any) -> dict[str, Tensor]:
    """The model's tensors as the original code stores them, buffers of old versions included."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.language_model.", "model.")
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
        name = name.replace("multi_modal_projector.linear_2", "mm_projector.2")
        state[name] = tensor.clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    prefix = "model.vision_tower.vision_tower.vision_model"
    state[f"{prefix}.embeddings.position_ids"] = torch.arange(37)[None]
    return state


def original_settings(model: Any, model_type: str, **more: Any) -> dict[str, Any]:
    """The flat config.json of the original code."""
    settings = model.config.text_config.to_dict()
    rope = settings.pop("rope_parameters")
    settings.pop("dtype")
    onevision = model.config.model_type == "llava_onevision"
    settings |= {
        "model_type": model_type,
        "architectures": ["LlavaLlamaForCausalLM"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": "float32",
        "mm_vision_tower": SIGLIP if onevision else CLIP,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 128,
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
    }
    if model.config.model_type != "llava":
        settings["image_aspect_ratio"] = "anyres_max_4" if onevision else "anyres"
        settings |= {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}
    return {**settings, **more}


def write(folder: Path, state: dict[str, Tensor], settings: dict[str, Any]) -> Path:
    """A folder with one safetensors file."""
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer().save_pretrained(folder)
    return folder


def write_shards(folder: Path, state: dict[str, Tensor], ending: str) -> None:
    """The state in two files with an index, instead of the one that is there."""
    (folder / "model.safetensors").unlink()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = list(state)
    places: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{number}-of-00002.{ending}"
        tensors = {name: state[name] for name in part}
        if ending == "safetensors":
            save_file(tensors, folder / file)
        else:
            torch.save(tensors, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"weight_map": places}))


def same_answers(original: Any, model: Any, processor: Any) -> None:
    """Bit-identical logits of the old tokens, on text and with a picture."""
    head = model.lm_head.weight[:VOCAB].clone()  # a product with more columns may round otherwise
    for pictures, words in ((None, "where cat ?"), (picture(), "where <image> cat ?")):
        inputs = dict(processor(images=pictures, text=words, return_tensors="pt"))
        inputs.pop("mm_token_type_ids", None)
        is_image = inputs["input_ids"] == model.config.image_token_id
        assert bool(is_image.any()) == (pictures is not None)
        old = {**inputs, "input_ids": inputs["input_ids"].masked_fill(is_image, SPARE)}
        with torch.no_grad():
            expected = original(**old).logits[..., :VOCAB]
            got = model(**inputs).logits
            hidden = model.model(**inputs).last_hidden_state
            assert torch.equal(torch.nn.functional.linear(hidden, head), expected)
        assert torch.allclose(got[..., :VOCAB], expected, atol=1e-6, rtol=0)
        assert got.argmax(-1).max() < VOCAB


# Round trips


def without_tower(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    prefix = "model.vision_tower.vision_tower."
    inside = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    apart = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    return inside, apart


def write_tower(folder: Path, state: dict[str, Tensor], config: Any, ending: str = "bin") -> Path:
    """A folder as of openai/clip-vit-*: the text model and the projections are there too."""
    folder.mkdir()
    state |= {"text_model.final_layer_norm.bias": torch.ones(3), "logit_scale": torch.ones(())}
    state |= {"visual_projection.weight": torch.ones(3, 3)}
    if ending == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    kind = config.model_type.removesuffix("_vision_model")
    whole = {"model_type": kind, "vision_config": config.to_dict(), "text_config": {}}
    (folder / "config.json").write_text(json.dumps(whole))
    return folder
