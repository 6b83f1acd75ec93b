"""The command `mmlm calibrate sinks`: what it writes and prints, and what it refuses at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmlm_efficient import VAR, load
from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pocket import scene
from mmlm_efficient.sinks.dimensions import sinks_for
from mmlm_efficient.sinks.profiles import named_profile
from tests.command import Run, runner

pytest.importorskip("matplotlib")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture
def fails_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test whose command gets as far as to load a model."""

    def loaded(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded before the command line was checked")

    monkeypatch.setattr("mmlm_efficient.loading.load", loaded)


def test_a_profile_and_a_picture_are_written(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "pocket.yaml"
    result = run("calibrate", "sinks", "--images", "pocket", "--samples", 8, "--out", out)
    assert result.code == 0, result.err
    profile = named_profile(str(out))
    assert f"sink dimensions {', '.join(map(str, profile.dims))} at the threshold" in result.out
    assert f"VAR(sink_dims='{out}')" in result.out
    assert "warning: only 8 prompts" in result.out
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.parent.iterdir()) == ["pocket.png", "pocket.yaml"]
    with load("pocket") as lmm:
        assert sinks_for(lmm.model, lmm._parts.identity, str(out)).dims == profile.dims
    # The same command again replaces its own files, and gives the same.
    assert run("calibrate", "sinks", "--images", "pocket", "--samples", 8, "--out", out).code == 0
    again = named_profile(str(out))
    assert (again.dims, again.layers) == (profile.dims, profile.layers)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_weights_have_a_profile_of_their_own(
    run: Run, tmp_path: Path, quantization: Any
) -> None:
    calibrate = ("calibrate", "sinks", "--images", "pocket", "--samples", 4, "--dims", 85)
    plain, packed = tmp_path / "plain.yaml", tmp_path / "packed.yaml"
    assert run(*calibrate, "--out", plain).code == 0
    result = run(*calibrate, "--out", packed, "--quantization", quantization)
    assert result.code == 0, result.err
    with load("pocket", quantization=quantization, methods=[VAR(sink_dims=str(packed))]) as lmm:
        for _ in range(2):  # a first run may put packed weights into another order
            lmm.ask("What is in the picture?", scene("heldout", 56).image, max_new_tokens=2)
        message = "This model is quantized.*mmlm calibrate sinks --quantization"
        with pytest.raises(SettingsError, match=message):
            lmm.using(VAR(sink_dims=str(plain))).__enter__()
    with pytest.raises(SettingsError, match="other weights.*sinks, or give"):
        load("pocket", methods=[VAR(sink_dims=str(packed))])
    assert run(*calibrate, "--out", plain, "--quantization", "int7").code == 2


def test_json_for_scripts(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "p.yml"
    result = run(
        *("calibrate", "sinks", "--images", "pocket", "--samples", 4, "--out", out),
        *("--dims", "7, 3", "--threshold", 6.5, "--json"),
    )
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert summary["profile"] == str(out)
    assert summary["picture"] == str(tmp_path / "p.png")
    assert (summary["dims"], summary["threshold"], summary["samples"]) == ([7, 3], 6.5, 4)
    assert any("look inert" in warning for warning in summary["warnings"])
    assert len(summary["layers"]) == 6
    assert yaml.safe_load(out.read_text(encoding="utf-8"))["kind"] == "sinks"


def test_nothing_found_writes_nothing(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "p.yaml"
    result = run(
        *("calibrate", "sinks", "--images", "pocket", "--samples", 4, "--out", out),
        *("--threshold", 13.5),
    )
    assert result.code != 0
    assert "pocket: no dimension is massive in 4 prompts" in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_threshold_out_of_reach_says_what_is_possible(run: Run, tmp_path: Path) -> None:
    result = run(
        *("calibrate", "sinks", "--images", "pocket", "--samples", 4, "--threshold", 20),
        *("--out", tmp_path / "p.yaml"),
    )
    assert result.code != 0
    assert "sqrt(192) = 13.86" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("fails_late")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "no such folder"), "neither a folder nor a file"),
        (("--images", "pocket", "--out", "p.json"), "must end in '.yaml'"),
        (("--images", "pocket", "--dims", "1;2"), "--dims 1;2: write numbers with commas"),
    ],
)
def test_wrong_options_are_refused_at_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("calibrate", "sinks", *options)
    assert result.code != 0
    assert message in result.err


@pytest.mark.usefixtures("fails_late")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.yaml", "model: pocket\n", "exists and is no sink profile"),
        ("p.yaml", None, "is a folder"),
        ("p.png", "my holidays", "which belongs to no sink profile"),
    ],
)
def test_other_files_are_not_overwritten(
    run: Run, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(content, encoding="utf-8")
    result = run("calibrate", "sinks", "--images", "pocket", "--out", tmp_path / "p.yaml")
    assert result.code != 0
    assert message in result.err
    if content is not None:
        assert (tmp_path / name).read_text(encoding="utf-8") == content
