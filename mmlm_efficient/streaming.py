"""Text as it is generated: the iterator that `EfficientLMM.stream` returns."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from transformers import TextIteratorStreamer

from mmlm_efficient.answers import Answer
from mmlm_efficient.clock import Watch


class _Job:
    """What the worker thread and the reader share. Knows nothing of the stream that reads it, so
    that a stream nobody holds any more is collected, and closed, while the worker still runs."""

    def __init__(
        self,
        work: Callable[[Watch, TextIteratorStreamer], list[Answer]],
        watch: Watch,
        streamer: TextIteratorStreamer,
    ) -> None:
        self.work: Callable[[Watch, TextIteratorStreamer], list[Answer]] | None = work
        self.watch = watch
        # Autocast belongs to a thread; the worker's is that of whoever asks.
        self.autocast = [
            torch.autocast(device, dtype=torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda", "mps", "xpu")
            if torch.is_autocast_enabled(device)
        ]
        self.streamer = streamer
        self.answer: Answer | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            work, self.work = self.work, None  # holds features: not for as long as the stream is
            with ExitStack() as stack:
                for autocast in self.autocast:
                    stack.enter_context(autocast)
                self.answer = None if work is None else work(self.watch, self.streamer)[0]
        except BaseException as error:  # noqa: BLE001 - handed to the reader, who raises it
            # Its frames hold what the answer ran on. (What a closure holds would stay.)
            traceback.clear_frames(error.__traceback__)
            self.error = error
        finally:
            work = None
            # Ends the iteration also when generate() never came to its own end.
            self.streamer.on_finalized_text("", stream_end=True)


class AnswerStream:
    """Pieces of one answer as they are generated; joined, they are the answer's text.

    Iterate over it to the end, or close it (also by leaving a `with` block, or by dropping it):
    generation then stops after the current token and its thread ends.

    Attributes:
        answer: the complete answer once the iteration is over or the stream is closed; until
            then None. After an early close it holds the text so far, finish reason "cancelled".
    """

    def __init__(
        self,
        work: Callable[[Watch, TextIteratorStreamer], list[Answer]],
        watch: Watch,
        tokenizer: Any,
    ) -> None:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._job = _Job(work, watch, streamer)
        self._over = False
        self._started = False
        self._blanks = ""  # held back: blanks at the end are no part of the answer
        self._thread = threading.Thread(target=self._job.run, name="mmlm-stream", daemon=True)
        self._thread.start()

    @property
    def answer(self) -> Answer | None:
        return None if self._thread.is_alive() else self._job.answer

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        if self._over:
            raise StopIteration
        for piece in self._job.streamer:
            text = self._without_outer_blanks(piece)
            if text:
                return text
        self._over = True
        self._thread.join()
        if self._job.error is not None:
            raise self._job.error
        raise StopIteration

    def _without_outer_blanks(self, piece: str) -> str:
        text = self._blanks + piece
        if not self._started:
            text = text.lstrip()
        kept = text.rstrip()
        if not kept:
            self._blanks = text
            return ""
        self._started = True
        self._blanks = text[len(kept) :]
        return kept

    def close(self) -> None:
        """Stop generating after the current token and wait for the thread. Safe to call twice."""
        self._job.watch.cancelled = True
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The constructor may have failed before it; at the interpreter's exit the module is empty.
        if hasattr(self, "_thread") and self._thread.is_alive() and threading is not None:
            self.close()
