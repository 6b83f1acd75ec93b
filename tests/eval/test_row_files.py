"""Digests of the files that a row's settings name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from eval.plan import EvalConfig
from eval.row_files import file_digests, profiles_of
from mmlm_efficient.errors import SettingsError
from mmlm_efficient.names import POCKET_WEIGHTS
from mmlm_efficient.pruning.random_pruning import RandomPruning
from mmlm_efficient.pruning.vflowopt import VFlowOpt
from mmlm_efficient.pruning.vflowopt_profiles import built_in


def digests(method: Any, model: str = "pocket") -> dict[str, str]:
    return file_digests(method, model)


def test_an_edited_profile_is_another_row(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    shutil.copy(built_in()["pocket-25"], path)
    method = VFlowOpt(keep_ratio=0.25, profile=str(path))
    before = digests(method)
    assert list(before) == ["profile_sha"]
    assert len(before["profile_sha"]) == 12
    assert before == digests(VFlowOpt(keep_ratio=0.25, profile="pocket-25")), "wherever it lies"
    path.write_text(path.read_text() + "# a remark\n")
    assert digests(method) != before


def test_a_profile_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match="'gone.yaml' is neither a file nor a built-in"):
        digests(VFlowOpt(keep_ratio=0.25, profile="gone.yaml"))


def test_the_models_own_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = VFlowOpt(keep_ratio=0.25)
    assert {path.stem[:6] for path in profiles_of("pocket")} == {"pocket"}
    assert digests(auto) == digests(auto, str(POCKET_WEIGHTS))
    assert digests(auto, "nobody/nothing") == {}
    assert digests(VFlowOpt(keep_ratio=0.25, profile="none")) == {}
    of_others = digests(auto, "nobody/llava-onevision-qwen2-7b-ov-hf")
    assert of_others not in ({}, digests(auto))
    copies = {name: tmp_path / path.name for name, path in built_in().items()}
    for name, path in built_in().items():
        shutil.copy(path, copies[name])
    before = digests(auto)
    monkeypatch.setattr("eval.row_files.built_in", lambda: copies)
    assert digests(auto) == before
    copies["pocket-50"].write_text(copies["pocket-50"].read_text() + "\n")
    assert digests(auto) != before


class _Method(RandomPruning):
    table: str = Field("auto")


def test_files_of_any_other_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "auto").write_text("no setting means this file")
    assert digests(_Method(keep_tokens=4)) == {}
    path = tmp_path / "table.json"
    path.write_text("{}")
    before = digests(_Method(keep_tokens=4, table=str(path)))
    assert list(before) == ["table_sha"]
    path.write_text("[]")
    assert digests(_Method(keep_tokens=4, table=str(path))) != before


def test_settings_of_a_jobs_rows() -> None:
    values = {"tasks": ["a"], "methods": ["vflowopt:0.25", "random:8"]}
    job = EvalConfig.read(values).runs[0]
    found = job.row_settings()
    assert list(found) == ["none", "vflowopt:0.25", "random:8"]
    assert found["none"] == {}
    assert found["random:8"] == job.rows[2].settings
    digest = found["vflowopt:0.25"]["vflowopt"].pop("profile_sha")
    assert digest == digests(VFlowOpt(keep_ratio=0.25))["profile_sha"]
    assert found["vflowopt:0.25"] == job.rows[1].settings
    assert "profile_sha" not in str(job.to_dict()), "a config is written without it"
