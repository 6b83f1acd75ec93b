"""Where the samples of a calibration come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mmlm_efficient.calibration.data import QUESTION, find_samples
from mmlm_efficient.errors import MediaError, SettingsError


def pictures(folder: Path, count: int) -> Path:
    """A folder of small pictures."""
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"p{number}.png")
    return folder


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    pictures(tmp_path, 5)
    (tmp_path / "notes.txt").write_text("no picture")
    found = find_samples(tmp_path, 3, seed=1)
    assert len({sample.name for sample in found}) == 3
    assert all(sample.question == QUESTION for sample in found)
    assert found[0].image().size == (8, 8)
    assert found == find_samples(str(tmp_path), 3, seed=1)
    assert {sample.name for sample in find_samples(tmp_path, 99)} == {f"p{n}.png" for n in range(5)}


def test_a_folder_with_questions_and_a_list(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    lines = [{"image": f"p{n}.png", "question": f"is it {n}?"} for n in range(2)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"image": "p2.png"}])
    (tmp_path / "questions.jsonl").write_text(text)
    for source in (tmp_path, tmp_path / "questions.jsonl"):
        asked = {sample.name: sample.question for sample in find_samples(source, 3)}
        assert asked == {"p0.png": "is it 0?", "p1.png": "is it 1?", "p2.png": QUESTION}


def test_pocket_scenes_are_those_of_the_calibration_split() -> None:
    found = find_samples("pocket", 4, seed=3)
    assert [sample.name for sample in found] == [s.name for s in find_samples("pocket", 4, seed=3)]
    assert len({sample.source for sample in found}) == 4
    assert found[0].image().size == (96, 96) or found[0].image().width > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: is not JSON"),
        ('["a.png"]', "line 3: expected .*image"),
        ('{"image": 3}', "line 3: expected .*image"),
        ('{"image": "p0.png", "question": ""}', "line 3: the question must be a text"),
        ('{"image": "gone.png"}', "line 3: there is no picture .*gone.png"),
    ],
)
def test_a_damaged_list_names_its_line(tmp_path: Path, line: str, message: str) -> None:
    pictures(tmp_path, 2)
    file = tmp_path / "list.jsonl"
    file.write_text('{"image": "p0.png"}\n\n' + line + "\n")
    with pytest.raises(SettingsError, match=message):
        find_samples(file, 3)


def test_data_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"holds 0 picture\(s\).*at least 2"):
        find_samples(tmp_path, 30)
    pictures(tmp_path, 1)
    with pytest.raises(SettingsError, match=r"holds 1 picture\(s\)"):
        find_samples(tmp_path, 30)
    with pytest.raises(SettingsError, match="neither a folder nor a file.*'pocket'"):
        find_samples(tmp_path / "nothing", 30)
    with pytest.raises(SettingsError, match="too few"):
        find_samples("pocket", 1)


def test_a_broken_picture_says_so(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    (tmp_path / "q.png").write_bytes(b"not a picture")
    broken = next(one for one in find_samples(tmp_path, 2) if one.name == "q.png")
    with pytest.raises(MediaError, match=r"q\.png"):
        broken.image()
