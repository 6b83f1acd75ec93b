"""One request, from media and words to an answer, readable from top to bottom.

`EfficientLMM` wraps a model of transformers and its processor and changes neither. A request goes
through five steps: pictures are loaded (`media`), the processor writes the prompt, the tower runs
and methods prune (`prepare`), transformers generates, and the new tokens are decoded and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from mmlm_efficient.answers import Answer, Run, kv_bytes
from mmlm_efficient.callbacks import CallersPrompt
from mmlm_efficient.clock import Stopwatch, Watch
from mmlm_efficient.errors import ContextError, SettingsError
from mmlm_efficient.families.base import Fit
from mmlm_efficient.generation import Settings, generated
from mmlm_efficient.inputs import forward_arguments, input_ids_of
from mmlm_efficient.names import model_name
from mmlm_efficient.prepare import LMMParts, Prepared, check_family, check_methods, prepare
from mmlm_efficient.processors import image_stats
from mmlm_efficient.prompts import (
    AnyRequest,
    Images,
    Request,
    Videos,
    as_request,
    default_sampling,
    preprocess,
    video_share,
    with_video,
)
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.sampling import check_seed
from mmlm_efficient.settings import (
    MethodLike,
    as_methods,
    check_for_answers,
    check_generation,
    check_generation_values,
    generation_names,
    refuse_unknown,
)
from mmlm_efficient.stations.active import activate, active_request
from mmlm_efficient.stations.handed import given_cache, with_cache_renamed
from mmlm_efficient.streaming import AnswerStream
from mmlm_efficient.video.sampling import FrameSampling

Methods: TypeAlias = "MethodLike | Sequence[MethodLike] | None"


@dataclass(frozen=True)
class _Request:
    """Everything that is decided before the model runs."""

    asked: Sequence[Request]
    inputs: Mapping[str, Any]
    methods: tuple[Method, ...]
    generation: Mapping[str, Any]
    max_new_tokens: int
    seed: int | None
    stopwatch: Stopwatch
    preprocess_s: float


@dataclass(frozen=True)
class _Ready:
    """A request whose images went through the tower; all that is left is to generate."""

    request: _Request
    prepared: Prepared
    prepare_s: float


class EfficientLMM:
    """A multimodal model that prunes visual tokens on the way, and says what it did.

    Args:
        model: a model of transformers that belongs to a supported family, also compiled, with
            adapters, or off-loaded and split by accelerate; it stays usable beside.
        processor: its processor, with a chat template for `ask`.
        methods: what every request goes through unless it says otherwise: method objects, or
            their short forms such as "flowcut:64".
        name: what messages and profiles call the model; if left out, what it was loaded from.

    Raises:
        UnsupportedError: the family of the model, or a method on it, is not supported.
        SettingsError: the methods cannot work together.

    Example:
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> from mmlm_efficient.loading import find_folder
        >>> from mmlm_efficient.pocket import scene
        >>> folder = find_folder("pocket")  # any folder or hub id of a supported family
        >>> model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
        >>> lmm = EfficientLMM(model, AutoProcessor.from_pretrained(folder), "flowcut:36")
        >>> answer = lmm.ask("What is in the picture?", image=scene("heldout", 56).image)
        >>> answer.usage.visual_tokens_in, answer.usage.visual_tokens_kept["bridge"]
        (144, 36)
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        methods: Methods = (),
        name: str | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self._parts = LMMParts(model, image_stats(processor), name)
        self.name = name or model_name(self._parts.family.model)
        try:
            self._parts.family.input_device  # noqa: B018 (refuses a model without weights)
            self._methods = self._checked(methods)
        except Exception:
            self._parts.close()
            raise

    @property
    def parts(self) -> LMMParts:
        """The model with its stations, for `prepare` and `encode`."""
        return self._parts

    @property
    def image_fit(self) -> Fit:
        """How pictures are made to fit the tower: "crop", "stretch" or "pad", see `Panel`."""
        return self._parts.family.image_fit(self.processor)

    @property
    def sampling(self) -> FrameSampling:
        """Which frames of a video file are taken when a request does not say."""
        return default_sampling(self._parts.family)

    # Methods

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that a request goes through when it names none itself."""
        override = active_request(self)
        return self._methods if override is None else cast("tuple[Method, ...]", override)

    @contextmanager
    def using(self, *methods: MethodLike | Sequence[MethodLike]) -> Iterator[EfficientLMM]:
        """Other methods for a while, in this thread (or asyncio task) only.

        Args:
            methods: method objects or short forms, or one list of them; none at all means the
                stock model.

        Example:
            >>> from mmlm_efficient import FlowCut, load
            >>> from mmlm_efficient.pocket import scene
            >>> lmm = load("pocket")
            >>> with lmm.using(FlowCut(keep_tokens=18)):
            ...     answer = lmm.ask("What is in the picture?", image=scene("heldout", 56).image)
            >>> answer.report.methods, lmm.methods
            (('flowcut',), ())
        """
        chosen: Any = methods
        if len(methods) == 1 and isinstance(methods[0], list | tuple):
            chosen = methods[0]
        with activate(self, self._checked(chosen)):
            yield self

    def _checked(self, methods: Methods) -> tuple[Method, ...]:
        """Methods as objects, refused when they clash or do not know the family, and all of them
        once the hooks are gone: every request comes by here."""
        self._parts.check_open()
        if methods is None:
            return self.methods
        chosen = as_methods(methods)
        check_methods(chosen)
        check_family(chosen, self._parts.family, self._parts.identity)
        if any("attention" in method.owned_stations for method in chosen):
            self._parts.attention.check_backend()
        return chosen

    # Questions and answers

    def ask(
        self,
        question: str,
        image: Images = None,
        methods: Methods = None,
        max_new_tokens: int = 64,
        seed: int | None = None,
        *,
        video: Videos = None,
        sampling: FrameSampling | None = None,
        **generation: Any,
    ) -> Answer:
        """Answer one question about no, one or several images, or a video.

        Args:
            question: in words. The images come before it, in order; to place them elsewhere,
                write the model's image token (such as "<image>") once per image. The same goes
                for a video, with the model's video token or else "<video>".
            image: path, encoded bytes, PIL image, array, or a list of those; see `load_image`.
            methods: instead of the model's own; () for the stock model.
            max_new_tokens: upper limit of the answer, tokens; the context may end it earlier.
            seed: makes sampling reproducible without touching torch's global random state.
            video: path, bytes of a file, a list of frames, or a `Video`; see `load_video`. To a
                model without an input for videos, each frame is an image of the prompt.
            sampling: which frames of a video file to take; None is the model's own `sampling`.
            generation: passed on to transformers' generate(), such as do_sample, temperature or
                stop_strings. With a generation_config, max_new_tokens of this call is the one
                that counts.

        Raises:
            PromptError: empty question, placeholders that do not match the images, or a prompt
                longer than the context.
            MediaError: an image or a video that cannot be read.
            SettingsError: unknown argument or method, or a value that generate() refuses.
            UnsupportedError: a setting that the machine or a method does not support, images
                beside a video whose frames are images, or `close` was called.
        """
        request = Request(question, image, video)
        return self.ask_batch(
            [request], methods, max_new_tokens, seed, sampling=sampling, **generation
        )[0]

    def ask_batch(
        self,
        requests: Sequence[AnyRequest],
        methods: Methods = None,
        max_new_tokens: int = 64,
        seed: int | None = None,
        *,
        sampling: FrameSampling | None = None,
        **generation: Any,
    ) -> list[Answer]:
        """Answer several questions in one batch; each answer is what `ask` gives alone.

        Two things belong to the batch and not to one question. With sampling, the questions draw
        from one sequence of random numbers: a seed reproduces the batch, not the answers that
        `ask` gives with that seed. And the prompts are padded to the longest one, which decides
        how many new tokens the context leaves room for.

        Args:
            requests: pairs of question and images, or `Request` with a video too.
            methods, max_new_tokens, seed, sampling, generation: as in `ask`, for all of them.

        Raises:
            PromptError: a request is neither; otherwise as `ask`.
        """
        if not requests:
            return []
        request = self._request(requests, methods, max_new_tokens, seed, sampling, generation)
        return self._answer(self._ready(request), Watch(request.stopwatch))

    def stream(
        self,
        question: str,
        image: Images = None,
        methods: Methods = None,
        max_new_tokens: int = 64,
        seed: int | None = None,
        *,
        video: Videos = None,
        sampling: FrameSampling | None = None,
        **generation: Any,
    ) -> AnswerStream:
        """Answer like `ask`, piece by piece as the text is generated.

        The pictures are read, the tower runs and methods prune before this returns: bad input
        (settings, seed, images, budgets, a prompt longer than the context) raises here. What goes
        wrong while generating raises from the iteration.

        Returns:
            An iterator of pieces of text. Closing it stops the generation; `.answer` is the
            complete answer afterwards.

        Example:
            >>> from mmlm_efficient import load
            >>> from mmlm_efficient.pocket import scene
            >>> lmm = load("pocket")
            >>> stream = lmm.stream("What is in the picture?", image=scene("heldout", 56).image)
            >>> pieces = [piece for piece in stream]  # or print(piece, end="", flush=True)
            >>> "".join(pieces) == stream.answer.text
            True
        """
        check_generation_values(generation)
        if self._settings(generation).value("num_beams") not in (None, 1):
            raise SettingsError(
                "num_beams: beams are known only at the end and cannot be streamed. Use ask()."
            )
        one = Request(question, image, video)
        request = self._request([one], methods, max_new_tokens, seed, sampling, generation)
        ready = self._ready(request)
        work = partial(self._answer, ready)
        return AnswerStream(work, Watch(request.stopwatch), self.processor.tokenizer)

    # The signatures of transformers

    def generate(self, *, methods: Methods = None, seed: int | None = None, **inputs: Any) -> Any:
        """transformers' own generate(), with pruning.

        Args:
            methods: instead of the model's own; () for the stock model.
            seed: makes sampling reproducible without touching torch's global random state.
            inputs: the processor's output (input_ids [B, S] with one placeholder per unpruned
                visual token, attention_mask, pixel_values) and any argument of generate(). Stop
                strings are read by the processor's tokenizer unless tokenizer is given.

        Returns:
            What transformers returns: int64 [B, S + new] or, with return_dict_in_generate, an
            output object whose `sequences` are that. The first S columns are the caller's own
            input_ids, not the shortened ones, so slicing by their length gives the new tokens.

        Raises:
            PromptError: placeholders or the attention mask do not match, or the prompt exceeds
                the context.
            SettingsError: unknown argument or method, or a value that generate() refuses.
            UnsupportedError: an input that pruning cannot follow, such as a filled cache, or a
                setting that the machine or a method does not support.
        """
        inputs = with_cache_renamed(inputs)
        names = generation_names()
        generation = {name: value for name, value in inputs.items() if name in names}
        model_inputs = {name: value for name, value in inputs.items() if name not in names}
        check_generation(model_inputs, also=forward_arguments(self._parts.family))
        own_ids = input_ids_of(model_inputs)
        check_generation_values(generation)
        settings = self._settings(generation)
        settings.check_max_length(own_ids.shape[1])
        with torch.no_grad():
            prepared = self._prepare(model_inputs, methods)
            prompt = CallersPrompt(own_ids, prepared.layout.mask.shape[1])
            output = self._generate(prepared, settings, seed, prompt)
        if isinstance(output, Tensor):
            return prompt.restored(output)
        output.sequences = prompt.restored(output.sequences)
        return output

    def forward(self, *, methods: Methods = None, **inputs: Any) -> Any:
        """One forward pass of the model over a prompt, with pruning.

        Args:
            methods: instead of the model's own; () for the stock model.
            inputs: as the model's forward() takes them; labels [B, S] of the unpruned prompt are
                cut wherever tokens are, so the loss is that of the tokens that are left.

        Returns:
            The model's output; logits [B, S', V] over the shortened prompt.
        """
        inputs = with_cache_renamed(inputs)
        refuse_unknown(inputs, forward_arguments(self._parts.family), "forward")
        input_ids_of(inputs)
        prepared = self._prepare(inputs, methods)
        model_inputs = prepared.model_inputs
        # Cuts inside the language model come after the model has taken its labels: the loss waits.
        labels = model_inputs.pop("labels", None) if prepared.cuts_layers else None
        with prepared.active():
            output = self.model(**model_inputs)
        prepared.check_acted(0)
        return output if labels is None else self._with_loss(output, prepared.labels_left(labels))

    def _with_loss(self, output: Any, labels: Tensor) -> Any:
        """The model's output with its own loss in front."""
        model = self._parts.family.model
        vocabulary = model.config.get_text_config().vocab_size
        loss = model.loss_function(logits=output.logits, labels=labels, vocab_size=vocabulary)
        return type(output)(loss=loss, **output)

    def close(self) -> None:
        """Take all hooks off the model: it is stock again, and this object refuses further
        requests. Safe to call twice."""
        self._parts.close()

    def __enter__(self) -> EfficientLMM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The steps of a request

    def _request(
        self,
        requests: Sequence[AnyRequest],
        methods: Methods,
        max_new_tokens: int,
        seed: int | None,
        sampling: FrameSampling | None,
        generation: Mapping[str, Any],
    ) -> _Request:
        """Steps 1 and 2: check the settings, load the pictures, write the prompts."""
        chosen = self._checked(methods)
        check_for_answers(generation, max_new_tokens)
        check_seed(seed)
        asked = [as_request(one, position) for position, one in enumerate(requests)]
        family = self._parts.family
        stopwatch = Stopwatch(family.input_device)
        start = stopwatch.now()
        asked = [with_video(one, family, sampling) for one in asked]
        inputs = preprocess(self.processor, asked, family.model.dtype, family)
        return _Request(
            asked=asked,
            inputs=inputs,
            methods=chosen,
            generation=generation,
            max_new_tokens=max_new_tokens,
            seed=seed,
            stopwatch=stopwatch,
            preprocess_s=stopwatch.now() - start,
        )

    def _ready(self, request: _Request) -> _Ready:
        """Step 3, under the clock."""
        start = request.stopwatch.now()
        try:
            with torch.no_grad():
                prepared = self._prepare(request.inputs, request.methods)
        except ContextError as error:
            ids = request.inputs["input_ids"]
            share = video_share(request.asked, ids, self._parts.family)
            raise ContextError(f"{error}{share}") from error
        return _Ready(request, prepared, request.stopwatch.now() - start)

    def _answer(self, ready: _Ready, watch: Watch, streamer: Any = None) -> list[Answer]:
        """Steps 4 and 5, under the clock."""
        request, prepared, now = ready.request, ready.prepared, ready.request.stopwatch.now
        start = now()
        width = prepared.layout.mask.shape[1]
        limit = min(request.max_new_tokens, self._room(width, prepared.model_inputs))
        settings = self._settings(request.generation)
        with torch.no_grad():
            output = self._generate(
                prepared,
                settings,
                request.seed,
                CallersPrompt(request.inputs["input_ids"], width),
                watch,
                max_new_tokens=limit,
                num_return_sequences=1,
                return_dict_in_generate=True,
                streamer=streamer,
            )
        end = now()
        first = end if watch.first_token_s is None else watch.first_token_s
        report = prepared.report()
        new_ids = output.sequences[:, width:].tolist()
        run = Run(
            prompt_tokens=prepared.layout.mask.sum(dim=1).tolist(),
            tokens_per_image=prepared.stock_tokens,
            report=report,
            end_ids=settings.token_ids("eos_token_id"),
            pad_id=next(iter(settings.token_ids("pad_token_id")), None),
            limit=limit,
            cancelled=watch.cancelled,
            cache_bytes=kv_bytes(given_cache(output)) // len(new_ids),
            preprocess_s=request.preprocess_s,
            prefill_s=ready.prepare_s + first - start - report.seconds.get("tower_s", 0.0),
            decode_s=end - first,
        )
        tokenizer = self.processor.tokenizer
        ended = watch.ended
        if (settings.value("num_beams") or 1) > 1:  # rows of their own, no answers before the end
            ended = watch.ends_of(output.sequences, width)
        return [
            run.answer(sample, ids, tokenizer, ended[sample] - width if sample in ended else None)
            for sample, ids in enumerate(new_ids)
        ]

    def _generate(
        self,
        prepared: Prepared,
        settings: Settings,
        seed: int | None,
        prompt: CallersPrompt,
        watch: Watch | None = None,
        **own: Any,
    ) -> Any:
        """Step 4: transformers' own generate(), see `generated`."""
        tokenizer = getattr(self.processor, "tokenizer", None)
        return generated(self.model, prepared, settings, seed, prompt, tokenizer, watch, **own)

    def _prepare(self, inputs: Mapping[str, Any], methods: Methods) -> Prepared:
        """Step 3: the tower runs, methods prune, the prompt shrinks to match."""
        device = self._parts.family.input_device
        on_device = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        mask = on_device.get("attention_mask")
        # The padding side is read off the mask: tokenizers may be set to either.
        right = isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, -1:] == 0).any())
        return prepare(
            self._parts,
            on_device,
            self._checked(methods),
            padding_side="right" if right else "left",
        )

    def _room(self, width: int, model_inputs: Mapping[str, Any]) -> int:
        """New tokens that fit into the context behind a prompt, at least one."""
        positions = model_inputs.get("position_ids")
        used = width if positions is None else int(positions.max()) + 1
        return max(1, self._parts.family.max_context - used)

    def _settings(self, generation: Mapping[str, Any]) -> Settings:
        """Generation settings of one call, with the model's own behind them."""
        return Settings(generation, self._parts.family.model.generation_config)
