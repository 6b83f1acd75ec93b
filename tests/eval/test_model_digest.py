"""What identifies the model of a run: `Job.config_sha`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eval.model_digest import tower_digest
from eval.plan import EvalConfig, Job
from mmlm_efficient.errors import ModelLoadError
from mmlm_efficient.names import POCKET_WEIGHTS

TASKS = ["mmlm_pocket_vqa"]


def read(**values: Any) -> Job:
    return EvalConfig.read({"tasks": TASKS, **values}).runs[0]


@pytest.fixture(scope="module")
def pocket_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "copy"
    shutil.copytree(POCKET_WEIGHTS, folder)
    return folder


def test_sha_sees_all_that_changes_answers(pocket_copy: Path) -> None:
    base = read().config_sha()
    assert len(base) == 12
    assert int(base, 16) >= 0
    changes: list[dict[str, Any]] = [
        {"dtype": "bfloat16"},
        {"seed": 1},
        {"attn_implementation": "eager"},
        {"generation": {"max_new_tokens": 3}},
        {"model": str(pocket_copy)},
        {"quantization": "int8"},
    ]
    shas = {read(**change).config_sha() for change in changes}
    assert len(shas | {base}) == len(changes) + 1


def test_sha_does_not_see_how_it_is_run() -> None:
    base = read().config_sha()
    for change in ({"batch_size": 1}, {"limit": 3}, {"methods": ["random:8"]}, {"tasks": ["b"]}):
        assert read(**change).config_sha() == base
    assert read(dtype="float32", device="cpu").config_sha() == base  # what they are by default
    assert read(model=str(POCKET_WEIGHTS)).config_sha() == base


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_sha_sees_the_files_of_a_model(pocket_copy: Path, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pocket_copy, folder)
    before = read(model=str(folder)).config_sha()
    assert before == read(model=str(pocket_copy)).config_sha()  # wherever the folder lies
    with (folder / name).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert read(model=str(folder)).config_sha() != before


def test_sha_of_a_cached_hub_model_is_its_commit(
    pocket_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shas = []
    for commit in ("a" * 40, "b" * 40):
        folder = tmp_path / "models--x--y" / "snapshots" / commit
        monkeypatch.setattr("mmlm_efficient.loading.find_folder", lambda _, found=folder: found)
        shas.append(read(model="x/y").config_sha())
    assert shas[0] != shas[1]


def test_sha_of_a_model_that_is_not_there() -> None:
    with pytest.raises(ModelLoadError, match="no/where/at/all"):
        read(model="no/where/at/all").config_sha()


# -- vision towers of their own ----------------------------------------------------------------


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """The folder of an original LLaVA model whose tower is elsewhere."""
    folder = tmp_path / "llava"
    folder.mkdir()
    config = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_tower_of_the_hub_counts_by_its_commit(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shas = set()
    for commit in ("a" * 40, "b" * 40):
        file = tmp_path / "models--openai--clip" / "snapshots" / commit / "model.safetensors"
        monkeypatch.setattr(
            "huggingface_hub.hf_hub_download", lambda repo, name, found=file: str(found)
        )
        assert tower_digest(str(original), None) == f"openai/clip @ {commit}"
        shas.add(read(model=str(original)).config_sha())
    assert len(shas) == 2


def test_a_tower_in_a_folder_counts_by_its_files(original: Path, pocket_copy: Path) -> None:
    given = tower_digest(str(original), str(pocket_copy))
    assert given != tower_digest(str(original), str(original))
    config = json.loads((original / "config.json").read_text())
    config["mm_vision_tower"] = str(pocket_copy)
    (original / "config.json").write_text(json.dumps(config))
    assert tower_digest(str(original), None) == given


def test_a_tower_within_the_weights_is_not_looked_for(original: Path) -> None:
    assert tower_digest("pocket", None) is None
    name = "model.vision_tower.vision_tower.vision_model.post_layernorm.weight"
    save_file({name: torch.zeros(2)}, original / "model.safetensors")
    assert tower_digest(str(original), None) is None
