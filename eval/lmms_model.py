"""Our model for lmms-eval's own command line and evaluator.

```
lmms-eval --model mmlm_efficient --model_args pretrained=pocket,methods=flowcut:36 \\
    --tasks mmlm_pocket_vqa --include_path eval/tasks --batch_size 8 --output_path OUT
```
It asks through the same `Engine` as `mmlm eval`, so both give the same answers. lmms-eval knows no
failed sample: when some fail, the others are still answered, then the run ends with a RunError
that names them, and no score is written. Beware that lmms-eval's command line exits with 0 after
any error; `mmlm eval` does not, and it counts failed samples.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from eval.engine import Engine, Outcome, failure
from eval.lmms_arguments import read_arguments
from eval.lmms_ids import id_column
from eval.messages import generation_of, sample_of_messages
from eval.task import Sample
from mmlm_efficient import load
from mmlm_efficient.errors import DataError, RunError, UnsupportedError

# Means over the samples, shown by lmms-eval as avg_<name>.
_MEANS = (
    "visual_tokens_in",
    "visual_tokens_kept",
    "visual_tokens_mean",
    "ttft_s",
    "prune_s",
    "prefill_s",
    "kv_bytes",
)
_NAMED = 5
# A task whose dialogue has not ended by then never will.
_MOST_ROUNDS = 100


@dataclass(frozen=True)
class _Asked:
    """A request of lmms-eval, before its document is read.

    Attributes:
        again: which request for this document it is, from 1.
        task, split: where the document is.
        number: of the document.
        column: that has the documents' ids; None where their numbers are their ids.
        messages: the task's doc_to_messages.
        generation, until: see `Sample`.
    """

    again: int
    task: str
    split: str
    number: int
    column: str | None
    messages: Callable[..., Any]
    generation: Mapping[str, Any]
    until: tuple[str, ...]

    @property
    def key(self) -> str:
        """Unique in its task, and known before the document is read."""
        return f"{self.number}" if self.again == 1 else f"{self.number}#{self.again}"

    def id(self, doc: Any) -> str:
        """What the runner calls the sample; further requests for it have "#2" and so on."""
        if self.column is None:
            return self.key
        return f"{doc[self.column]}" if self.again == 1 else f"{doc[self.column]}#{self.again}"

    @property
    def settings(self) -> tuple[str, str]:
        """Requests with the same ones can be answered together; ids are unique within a task."""
        return self.task, json.dumps(self.generation, sort_keys=True, default=str)


@dataclass
class _Tally:
    """What a call did, for lmms-eval's table and for the error at its end."""

    seconds: float = 0.0
    usages: list[Mapping[str, Any]] = field(default_factory=list)
    failures: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)

    def add(self, asked: _Asked, outcome: Outcome) -> str:
        """Note an outcome; returns its text, "" if it failed (which `finish` raises)."""
        if outcome.error is not None:
            self.failures.append((f"{asked.task} {outcome.id}", outcome.error))
        else:
            self.usages.append(outcome.usage)
        return outcome.text or ""

    def finish(self, requests: int) -> None:
        """Report to lmms-eval.

        Raises:
            RunError: samples failed.
        """
        if self.failures:
            names = ", ".join(name for name, _ in self.failures[:_NAMED])
            more = f" and {len(self.failures) - _NAMED} more" * (len(self.failures) > _NAMED)
            error = self.failures[0][1]
            raise RunError(
                f"the run failed, whatever exit code lmms-eval gives: {len(self.failures)} of "
                f"{requests} samples have no answer ({names}{more}). The first one: "
                f"{error['type']} ({error['where']}): {error['message']} lmms-eval cannot score "
                "a run with failed samples; `mmlm eval` can, and counts them."
            )
        if not self.usages:
            return
        extra = {name: fmean(usage[name] for usage in self.usages) for name in _MEANS}
        peaks = [peak for usage in self.usages if (peak := usage["peak_memory_bytes"]) is not None]
        if peaks:
            extra["peak_memory_bytes"] = max(peaks)
        tokens = sum(usage["completion_tokens"] for usage in self.usages)
        log_metrics(
            total_elapsed_time=self.seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / self.seconds if self.seconds > 0 else 0.0,
            additional_metrics={"total_requests": requests, **extra},
        )


class EfficientChatModel(lmms):  # type: ignore[misc]
    """A chat model of lmms-eval that prunes visual tokens.

    Args:
        arguments: of --model_args, with batch_size, max_batch_size and device of the command
            line; see `eval.lmms_arguments.read_arguments`.

    Raises:
        SettingsError: an argument that is unknown or has a bad value.
        ModelLoadError: the model cannot be loaded.
        UnsupportedError: several processes.
    """

    is_simple = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        world_size = os.environ.get("WORLD_SIZE", "1")
        if world_size != "1":
            raise UnsupportedError(
                f"lmms-eval was started with {world_size} processes, of which one would wait for "
                "ever if a sample failed in another. Start one process, or use `mmlm eval "
                "--workers N`, which spreads samples over processes and machines."
            )
        asked = read_arguments(arguments)
        self._methods = asked.model.methods
        self._defaults = asked.model.generation
        self._batch_size = asked.batch_size
        self._seed = asked.seed
        # Not modules of torch, which lmms-eval's clean() takes away after a run.
        self._lmm = load(**asked.model.load_options())
        self._engine = Engine(self._lmm)

    @property
    def batch_size(self) -> int:
        """Samples at once."""
        return self._batch_size

    @property
    def device(self) -> Any:
        """Where the model is."""
        return self._lmm.parts.family.input_device

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answers, cut at the task's texts, in the order of the requests.

        Raises:
            SettingsError: a task's generation settings are refused; nothing has run then.
            RunError: samples failed; all others were asked before it is raised.
        """
        asked = self._asked(requests)
        tally = _Tally()
        results: list[GenerationResult | None] = [None] * len(asked)
        with self._progress(len(asked)) as bar:
            for positions in _batches(asked, self._batch_size):
                outcomes = self._answer([asked[position] for position in positions], tally)
                for position, outcome in zip(positions, outcomes, strict=True):
                    text = tally.add(asked[position], outcome)
                    results[position] = GenerationResult(text, _counts(outcome))
                bar.update(len(positions))
        tally.finish(len(asked))
        return [result for result in results if result is not None]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of each request's rounds, as its task asks for them one after another.

        Raises:
            SettingsError, RunError: as `generate_until`.
        """
        asked = self._asked(requests)
        tally = _Tally()
        results = []
        with self._progress(len(asked)) as bar:
            for one in asked:
                results.append(self._rounds(one, tally))
                bar.update()
        tally.finish(len(asked))
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "loglikelihood: tasks that compare the likelihood of given answers (multiple_choice, "
            "loglikelihood) are not supported for chat models, and lmms-eval 0.7.3 fails on their "
            "scores. Choose a task with output_type generate_until."
        )

    def _asked(self, requests: Sequence[Any]) -> list[_Asked]:
        """The requests with their settings checked; documents are read batch by batch later."""
        asked = []
        seen: Counter[tuple[str, str, int]] = Counter()
        for request in requests:
            _, messages, given, number, task, split = request.args
            generation, until = generation_of(given, self._defaults)
            seen[task, split, number] += 1
            again = seen[task, split, number]
            column = id_column(request.metadata)
            asked.append(_Asked(again, task, split, number, column, messages, generation, until))
        return asked

    def _answer(self, asked: Sequence[_Asked], tally: _Tally) -> list[Outcome]:
        """Outcomes of a batch; a sample whose document cannot be read fails alone."""
        found: dict[str, Outcome] = {}
        samples: dict[str, Sample] = {}
        for one in asked:
            try:
                doc = self._doc(one)
                id = one.id(doc)
                if any(sample.id == id for sample in samples.values()):
                    raise DataError(f"column {one.column!r} has {id!r} several times.")
                messages = one.messages(doc)
                samples[one.key] = sample_of_messages(id, messages, one.generation, one.until)
            # Recorded, and raised when all others have been asked.
            except Exception as error:  # noqa: BLE001
                found[one.key] = failure(one.key, error, "media")
        outcomes = self._ask(list(samples.values()), tally)
        found |= dict(zip(samples, outcomes, strict=True))
        return [found[one.key] for one in asked]

    def _rounds(self, asked: _Asked, tally: _Tally) -> list[str]:
        """One dialogue: the task makes the next messages from the answers so far."""
        texts: list[str] = []
        info: Any = None
        try:
            doc = self._doc(asked)
            messages = asked.messages(doc)
            while True:
                id = f"{asked.id(doc)}, round {len(texts) + 1}"
                sample = sample_of_messages(id, messages, asked.generation, asked.until)
                [outcome] = self._ask([sample], tally)
                texts.append(tally.add(asked, outcome))
                if outcome.error is not None:
                    return texts
                if len(texts) == _MOST_ROUNDS:
                    raise RunError(f"the task has not ended after {_MOST_ROUNDS} rounds.")
                step = asked.messages(
                    doc,
                    round_idx=len(texts),
                    previous_output=list(texts),
                    previous_round_info=info,
                )
                if not isinstance(step, tuple) or len(step) != 4 or step[1]:
                    return texts
                messages, info = step[0], step[3]
        # As in `_answer`.
        except Exception as error:  # noqa: BLE001
            tally.add(asked, failure(asked.key, error, "media"))
            return texts

    def _ask(self, samples: Sequence[Sample], tally: _Tally) -> list[Outcome]:
        start = time.perf_counter()
        outcomes = self._engine.answer(samples, self._methods, self._seed)
        tally.seconds += time.perf_counter() - start
        return outcomes

    def _doc(self, asked: _Asked) -> Any:
        return self.task_dict[asked.task][asked.split][asked.number]

    def _progress(self, total: int) -> Any:
        return tqdm(total=total, desc="Answering", unit="sample", disable=self.rank != 0)


def _batches(asked: Sequence[_Asked], size: int) -> Iterator[Sequence[int]]:
    """Positions of requests that can be answered together, in the order of the first ones."""
    groups: dict[Any, list[int]] = {}
    for position, one in enumerate(asked):
        groups.setdefault(one.settings, []).append(position)
    for positions in groups.values():
        for start in range(0, len(positions), size):
            yield positions[start : start + size]


def _counts(outcome: Outcome) -> TokenCounts | None:
    """Tokens of an answer; those of the prompt are counted after pruning."""
    if outcome.error is not None:
        return None
    usage = outcome.usage
    return TokenCounts(
        input_tokens=usage["prompt_tokens"], output_tokens=usage["completion_tokens"]
    )
