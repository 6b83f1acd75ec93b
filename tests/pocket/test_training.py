"""Training: the pieces that must be exact, and a run that is killed and resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pocket.guidance import answer_loss
from mmlm_efficient.pocket.prompts import VISUAL, Encoder, Prefix
from mmlm_efficient.pocket.questions import Question
from mmlm_efficient.pocket.scenes import scene
from mmlm_efficient.pocket.train import train_pocket
from mmlm_efficient.pocket.train_tower import labels_of, normalise, tower_hidden
from mmlm_efficient.pocket.train_words import build
from mmlm_efficient.pocket.trainer import Schedule, run_stage
from mmlm_efficient.pocket.vocabulary import build_processor, build_tokenizer


def test_known_words_are_one_token_and_unknown_words_are_spelt() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("Where is the Octopus?") == ["where", "is", "the", "octopus", "?"]
    assert tokenizer.unk_token not in tokenizer.tokenize("zebra xylophone 1234 (why)!")
    text = "12, 7"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_tower_shortcut_equals_the_stock_model() -> None:
    """Training runs the tower on cut-outs; on a whole picture that is the stock forward."""
    model, _ = build(0)
    pixels = normalise(np.stack([scene("train", k).pixels for k in range(2)]))
    with torch.no_grad():
        ours = tower_hidden(model.model.vision_tower.eval(), pixels)
        stock = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(ours, stock, atol=1e-5)


def test_pixels_equal_the_image_processor() -> None:
    item = scene("train", 4)
    batch = build_processor().image_processor(images=item.image, return_tensors="pt")
    ours = normalise(item.pixels[None])
    assert torch.allclose(batch["pixel_values"], ours, atol=1e-6)


def test_packed_turns_equal_prompts_of_their_own() -> None:
    """Several turns behind one prefix give each the loss that it has alone."""
    model, encoder = build(0)
    model.eval()
    prefix = Prefix([encoder.bos, encoder.user, VISUAL, VISUAL], [0, 1, 2, 9], 12, [0, 64])
    turns = [
        Question("is_there", "is there a cat?", "yes"),
        Question("list", "list.", "cat, dog", order=(0, 1)),
    ]
    visual = torch.randn(2, 192)
    with torch.no_grad():
        losses = [
            answer_loss(model, encoder.batch([prefix], [[t]]), visual)[0]["answer"] for t in turns
        ]
        weights = [encoder.batch([prefix], [[t]]).weights.sum() for t in turns]
        packed, _ = answer_loss(model, encoder.batch([prefix], [turns]), visual)
    expected = sum(a * w for a, w in zip(losses, weights, strict=True)) / sum(weights)
    assert torch.allclose(packed["answer"], expected, atol=1e-5)


def test_batch_pads_without_touching_the_sample() -> None:
    encoder = Encoder(build_tokenizer())
    short, long = (
        Prefix([1, VISUAL], [0, 1], 2, [1]),
        Prefix([1, VISUAL, VISUAL], [0, 1, 2], 3, [1, 64]),
    )
    question = [Question("is_there", "is there a cat?", "yes")]
    batch = encoder.batch([short, long], [question, question])
    assert batch.visual.sum(1).tolist() == [1, 2]
    assert batch.shown.tolist()[1][1:3] == [1, -2]
    assert (batch.shown[1, 3:] == -2).all()
    assert (batch.named == 1).sum() == 2, "the word cat, kind 1, once in each row"
    assert (batch.about == 1).sum() == 4, "both targets (yes, end) of both rows are about it"
    cat = int((batch.named[1] == 1).nonzero())
    assert set(batch.first_key[1].tolist()) == set(batch.last_key[1].tolist()) == {-1, cat}
    assert batch.turns[0, -1] == -1
    assert batch.labels[0, -1] == -100
    seen = batch.mask()[0, 0] == 0
    assert seen.any(-1).all(), "an empty row of the mask would give NaN"
    assert seen[:, -1].nonzero().flatten().tolist() == [seen.shape[0] - 1], "padding is seen"


def test_labels_name_the_patch_under_an_object() -> None:
    item = scene("train", 9, n_objects=1)
    target = labels_of([item], np.zeros((1, 2), np.int64))
    x, y = item.objects[0].center_px
    patch = int(y) // 16 * 12 + int(x) // 16
    assert target["middle"][0].nonzero().flatten().tolist() == [patch]
    assert (target["x"][0, patch], target["y"][0, patch]) == item.objects[0].bins
    moved = labels_of([item], np.array([[0, 2]]))
    assert moved["x"][0, patch] == int((x + 32) / 6)


def test_a_killed_stage_goes_on_where_it_was(tmp_path: Path) -> None:
    def stage(folder: Path, stop_at: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        modules = nn.ModuleDict({"line": nn.Linear(3, 1)})

        def step(number: int) -> dict[str, torch.Tensor]:
            if number == stop_at:
                raise KeyboardInterrupt
            data = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
            return {"loss": (modules["line"](data) - data.sum(-1, keepdim=True)).square().mean()}

        run_stage("toy", modules, Schedule(30, 0.05, save_every=10), step, folder)
        return modules["line"].weight.detach().clone()

    undisturbed = stage(tmp_path / "a", None)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "b", 17)
    assert torch.equal(stage(tmp_path / "b", None), undisturbed)
    assert not list((tmp_path / "b").glob("*.partial"))
    with pytest.raises(SettingsError, match="use another folder"):
        run_stage("toy", nn.ModuleDict(), Schedule(31, 0.05), lambda _: {}, tmp_path / "b")


@pytest.mark.slow
def test_the_whole_recipe_in_miniature(tmp_path: Path) -> None:
    """Every stage runs, resumes at its end and writes a folder that stock classes load."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = train_pocket(tmp_path, threads=1, scale=0.001)
    assert train_pocket(tmp_path, threads=1, scale=0.001) == folder
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=scene("heldout", 0).image, text="<s><user><image>hi<assistant>",
                       return_tensors="pt")  # fmt: skip
    assert model(**inputs).logits.shape[-1] == len(processor.tokenizer)
    with pytest.raises(SettingsError, match="scale"):
        train_pocket(tmp_path, scale=0)
