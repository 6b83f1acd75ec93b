"""What the runner knows of a task: samples to ask about, and how answers are scored.

`local_task.LocalTask` reads a task's YAML and local data by itself; `lmms_task.LmmsTask` wraps a
task of lmms-eval. Both look like `Task` to the runner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Sample:
    """One question of a task.

    Attributes:
        id: unique in its task, the same in every run.
        question: in words; media are placed by the marks `IMAGE` and `VIDEO`, or go first.
        images: what `load_image` takes, in the order of their marks.
        video: what `load_video` takes, or None.
        target: the right answer as the task has it, for people; JSON.
        generation: arguments of generate(), such as max_new_tokens and do_sample.
        until: texts at which the answer ends, itself not part of it.
        group: part of the task's breakdown, such as the kind of question; or None.
        cluster: samples with the same cluster (a picture, a video) are not independent; None
            when the sample stands alone.
    """

    id: str
    question: str
    images: tuple[Any, ...] = ()
    video: Any = None
    target: Any = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    until: tuple[str, ...] = ()
    group: str | None = None
    cluster: str | None = None


@dataclass(frozen=True)
class Metric:
    """One figure of a task.

    Attributes:
        name: such as "exact_match".
        higher_is_better: direction.
        aggregation: how the figure comes from the samples' items: "mean", or the name of the
            task's own function.
    """

    name: str
    higher_is_better: bool = True
    aggregation: str = "mean"


class Task(Protocol):
    """What the runner asks of a task.

    Attributes:
        name: as on the command line.
        version: of the task's definition.
        metrics: at least one; the first is the one that tables show unless a config names another.
        data_sha: of the definition and the data, hex; the same on every machine.
        ids: of all samples, in order.
        source: where it comes from, in words, for reports.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def metrics(self) -> tuple[Metric, ...]: ...

    @property
    def data_sha(self) -> str: ...

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def source(self) -> str: ...

    def sample(self, id: str) -> Sample:
        """One sample with its media; raises DataError or MediaError if they cannot be read."""
        ...

    def score(self, id: str, answer: str) -> dict[str, Any]:
        """What an answer is worth: for each metric an item that survives JSON unchanged (for
        mean metrics a number)."""
        ...

    def aggregate(self, metric: str, items: Sequence[Any]) -> float:
        """The figure of a metric from the items of `score`, at least one."""
        ...


# How a question says where its media go; the engine writes the model's own tokens for them.
IMAGE = "<image>"
VIDEO = "<video>"
