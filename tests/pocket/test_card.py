"""The model card: measured on held-out scenes that training never composes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import mmlm_efficient.pocket
from benchmarks import pocket_card
from mmlm_efficient import EfficientLMM, load
from mmlm_efficient.pocket import video, video_questions
from mmlm_efficient.pocket.evaluate import answer_videos, evaluate_videos, video_prompt
from mmlm_efficient.pocket.questions import VIDEO_KINDS
from mmlm_efficient.pocket.scenes import rng_of
from mmlm_efficient.pocket.train import WEIGHTS, write_card


@pytest.fixture(scope="module")
def pocket() -> EfficientLMM:
    return load("pocket", dtype="float32")


def test_training_never_names_the_heldout_split() -> None:
    folder = Path(mmlm_efficient.pocket.__file__).parent
    files = sorted(folder.glob("train*.py"))
    assert len(files) >= 5
    assert not [f.name for f in files if '"heldout"' in f.read_text(encoding="utf-8")]


def test_a_video_prompt_names_the_times_before_the_frames(pocket: EfficientLMM) -> None:
    item = video("heldout", 3)
    prompt = video_prompt(item, "when does the cat appear?", pocket.processor)
    assert prompt.count("<image>") == 36 * len(item.frames)
    places = [prompt.index(f"{time_s} s") for time_s in item.times_s]
    assert places == sorted(places)
    assert prompt.endswith("when does the cat appear?<assistant>")


def test_answers_about_a_video_do_not_depend_on_its_batch_mates(pocket: EfficientLMM) -> None:
    asked = []
    for index in (4, 9):
        item = video("heldout", index)
        asked += [(item, q) for q in video_questions(item, rng_of("heldout", index, 9))]
    together = answer_videos(pocket.model, pocket.processor, asked)
    alone = [answer_videos(pocket.model, pocket.processor, [one])[0] for one in asked]
    assert together == alone


def test_evaluation_counts_every_question(pocket: EfficientLMM) -> None:
    counts = evaluate_videos(pocket.model, pocket.processor, videos=4, batch_size=5)
    asked = [
        q for k in range(4) for q in video_questions(video("heldout", k), rng_of("heldout", k, 9))
    ]
    assert set(counts) <= set(VIDEO_KINDS)
    assert sum(total for _, total in counts.values()) == len(asked)
    assert all(0 <= right <= total for right, total in counts.values())


def _pictures() -> dict[str, object]:
    entry = {"count": 10, "accuracy": 0.9, "interval": [0.6, 0.98]}
    return {
        "scenes": 1234,
        "rows": [{"method": "none", "kinds": {"list": entry}, "overall": entry}],
    }


def test_the_card_holds_what_was_measured(tmp_path: Path) -> None:
    videos = {
        "videos": 17,
        "kinds": {"video_time": {"count": 5, "accuracy": 0.4, "interval": [0, 1]}},
    }
    write_card(tmp_path, _pictures(), videos)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "<!--" not in card
    assert "1,234" in card
    assert "| list | 10 | 90.0% | 60.0% to 98.0% |" in card
    assert "| video_time | 5 | 40.0% | 0.0% to 100.0% |" in card
    assert not list(tmp_path.glob("*.partial"))


def test_the_benchmark_measures_videos_and_writes_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(WEIGHTS, folder)
    (folder / "README.md").unlink()
    pictures, out = tmp_path / "pictures.json", tmp_path / "videos.json"
    arguments = ["--model", str(folder), "--videos", "3", "--pictures", str(pictures)]
    assert pocket_card.main([*arguments, "--out", str(out)]) == 1
    assert "pictures.json is missing" in capsys.readouterr().err
    pictures.write_text(json.dumps(_pictures()), encoding="utf-8")
    assert pocket_card.main([*arguments, "--out", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["videos"] == 3
    assert "| video_presence |" in (folder / "README.md").read_text(encoding="utf-8")
