"""What `mmlm demo` shows: one scene, four questions, every method at the same budgets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmlm_efficient.answers import Answer
from mmlm_efficient.model import EfficientLMM
from mmlm_efficient.plots import Fit, Panel, cut_map, kept_tokens_panel
from mmlm_efficient.pocket.questions import Question, is_right, questions
from mmlm_efficient.pocket.scenes import Scene, scene

RATIOS = (0.5, 0.25, 0.125)
METHODS = ("none", *(f"{name}:{ratio}" for name in ("flowcut", "random") for ratio in RATIOS))
N_QUESTIONS = 4
# The first four that a scene allows: kinds whose answer needs one certain place of the picture.
_KINDS = ("what_is_at", "is_there", "extreme", "where_is", "how_many", "relation", "list")


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        method: its short form, as "flowcut:0.25".
        answers: one per question.
        right: whether each answer is right.
    """

    method: str
    answers: tuple[Answer, ...]
    right: tuple[bool, ...]

    @property
    def kept(self) -> int:
        """Visual tokens of the picture that entered the language model."""
        return self.answers[0].usage.visual_tokens_kept["bridge"]

    @property
    def kv_bytes(self) -> int:
        """Keys and values of the prompts and answers, mean over the questions, bytes."""
        return round(statistics.mean(answer.usage.kv_bytes for answer in self.answers))

    @property
    def tower_ms(self) -> float:
        """Vision tower with pruning inside it, median over the questions, milliseconds."""
        return statistics.median(answer.usage.tower_s for answer in self.answers) * 1e3

    @property
    def prefill_ms(self) -> float:
        """From visual tokens to the first new token, median over the questions, milliseconds."""
        return statistics.median(answer.usage.prefill_s for answer in self.answers) * 1e3

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "method": self.method,
            "answers": [answer.text for answer in self.answers],
            "right": list(self.right),
            "visual_tokens_kept": self.kept,
            "kv_bytes": self.kv_bytes,
            "tower_ms": self.tower_ms,
            "prefill_ms": self.prefill_ms,
        }


@dataclass(frozen=True)
class Demo:
    """A scene, its questions, and what every method answered.

    Attributes:
        scene: what was asked about.
        questions: with their right answers.
        rows: one per method and budget.
        fit: how the model's image processor makes pictures fit, see `Panel`.
    """

    scene: Scene
    questions: tuple[Question, ...]
    rows: tuple[Row, ...]
    fit: Fit = "crop"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "scene": {"split": self.scene.split, "index": self.scene.index},
            "questions": [
                {"kind": one.kind, "text": one.text, "answer": one.answer} for one in self.questions
            ],
            "rows": [row.to_dict() for row in self.rows],
        }

    def draw(self, path: Path) -> tuple[Path, Path]:
        """Draw which patches every method kept, and where FlowCut cut.

        Args:
            path: PNG file of the kept patches; the cut map goes beside it.

        Returns:
            The two files.
        """
        panels = [
            Panel(
                self.scene.image,
                row.answers[0].report.images[0],
                f"{row.method.split(':')[0]}: {row.kept} tokens",
                fit=self.fit,
            )
            for row in self.rows
        ]
        kept_tokens_panel(panels, path, "Patches that reach the language model")
        cuts = path.with_name(f"{path.stem}_cuts.png")
        quarter = next(row for row in self.rows if row.method == "flowcut:0.25")
        report = quarter.answers[0].report.images[0]
        title = f"FlowCut, {quarter.kept} tokens: cuts by layer"
        cut_map(self.scene.image, report, cuts, title, fit=self.fit)
        return path, cuts


def run_demo(
    lmm: EfficientLMM, index: int, progress: Callable[[Sequence[str]], Iterable[str]]
) -> Demo:
    """Ask four questions about one held-out scene with every method.

    Args:
        lmm: the pocket model, or another that knows the objects.
        index: number of the held-out scene.
        progress: wraps the methods while they are gone through, as tqdm does.
    """
    picture = scene("heldout", index)
    asked = questions(picture, np.random.default_rng(index), kinds=_KINDS)[:N_QUESTIONS]
    lmm.ask(asked[0].text, picture.image, methods=(), max_new_tokens=2)  # not on the clock
    rows = []
    for method in progress(METHODS):
        answers = tuple(
            lmm.ask(question.text, picture.image, methods=method, max_new_tokens=32)
            for question in asked
        )
        right = tuple(
            is_right(question, answer.text) for question, answer in zip(asked, answers, strict=True)
        )
        rows.append(Row(method, answers, right))
    return Demo(picture, tuple(asked), tuple(rows), lmm.image_fit)


def show_demo(result: Demo, files: Sequence[str], console: Console) -> None:
    """Print the questions and a table of answers and costs.

    Args:
        result: what `run_demo` returned.
        files: the pictures that were drawn.
        console: where to print.
    """
    total = result.rows[0].kept
    console.print(
        f"Scene {result.scene.index} (held out, {len(result.scene.objects)} objects, "
        f"{total} visual tokens). Questions and right answers:"
    )
    for number, one in enumerate(result.questions, 1):
        console.print(f"  {number}. {one.text}  ->  {one.answer}", markup=False, highlight=False)
    table = Table()
    table.add_column("method")
    table.add_column("tokens kept", justify="right")
    table.add_column("KV bytes", justify="right")
    table.add_column("tower ms", justify="right")
    table.add_column("prefill ms", justify="right")
    for number in range(len(result.questions)):
        table.add_column(f"answer {number + 1}")
    for row in result.rows:
        name = "unpruned" if row.method == "none" else row.method.split(":")[0]
        cells = [
            Text(_short(answer.text), style="green" if right else "red strike")
            if console.is_terminal
            else Text(("" if right else "x ") + _short(answer.text))
            for answer, right in zip(row.answers, row.right, strict=True)
        ]
        table.add_row(
            name,
            f"{row.kept} ({row.kept / total:.1%})",
            f"{row.kv_bytes:,}",
            f"{row.tower_ms:.1f}",
            f"{row.prefill_ms:.1f}",
            *cells,
            end_section=row.method in ("none", "flowcut:0.125"),
        )
    console.print(table)
    console.print(
        "Wrong answers are struck out." if console.is_terminal else "x: a wrong answer.",
        "Times are medians over the questions; FlowCut prunes inside the tower.",
    )
    for path in files:
        console.print(f"Drew {path}", markup=False, highlight=False, soft_wrap=True)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
