"""From processor output to model inputs: run the tower, prune, shorten the prompt.

One request is prepared once and then run by the model's own ``forward`` or ``generate``::

    parts = LMMParts(model)
    prepared = prepare(parts, processor_output, [FlowCut(keep_tokens=64)])
    with prepared.active():
        ids = model.generate(**prepared.model_inputs, max_new_tokens=32)
    prepared.report().images[0].kept

With nothing to prune the model gets the features and the prompt that it would have made itself,
and its results are bit-identical to the stock model's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mmlm_efficient.bridging import cut_prompt, reduced
from mmlm_efficient.clock import Span
from mmlm_efficient.encoding import Encoded, run_tower
from mmlm_efficient.errors import ContextError, SettingsError, UnsupportedError
from mmlm_efficient.families import Family, family_of
from mmlm_efficient.families.base import Identity, Visual
from mmlm_efficient.inputs import needs_stock, uncut_layout
from mmlm_efficient.names import model_name
from mmlm_efficient.pruning.base import LayerJob, Method, PruningMethod
from mmlm_efficient.reports import CropRuns, image_report
from mmlm_efficient.stations.attention import AttentionRequest, AttentionStation
from mmlm_efficient.stations.bridge import (
    IGNORED_LABEL,
    PaddingSide,
    PromptLayout,
    check_labels,
    check_visible,
    prompt_positions,
)
from mmlm_efficient.stations.layer import LayerRequest, LayerStation
from mmlm_efficient.stations.packed_tower import PackedTowerParts, PackedTowerStation
from mmlm_efficient.stations.tower import TowerRun, TowerStation
from mmlm_efficient.tokens import PruningReport, VisualTokens

ImageStats: TypeAlias = "tuple[tuple[float, ...], tuple[float, ...]]"


class LMMParts:
    """A model, its family and the stations on it. Built once per model, closed when done.

    Args:
        model: a transformers model of a supported family.
        image_stats: the image processor's (mean, std) per channel, for methods that look at
            8-bit pixels; None when it is not known.
        name: what the model was loaded as, for settings that belong to one model; None asks the
            model itself, see `model_name`.

    Raises:
        UnsupportedError: no family knows the model.
    """

    def __init__(
        self, model: Any, image_stats: ImageStats | None = None, name: str | None = None
    ) -> None:
        self.model = model
        self.family: Family = family_of(model)  # of what is inside a wrapper
        tower = self.family.tower
        self.tower: TowerStation | PackedTowerStation = (
            PackedTowerStation(tower)
            if isinstance(tower, PackedTowerParts)
            else TowerStation(tower)
        )
        self.layer = LayerStation(self.family.decoder)
        # Behind the layer station: its cuts decide what enters a layer's attention.
        self.attention = AttentionStation(self.family.decoder)
        self.image_stats = image_stats
        self.identity: Identity = self.family.identity(model_name(self.family.model, name))

    def close(self) -> None:
        """Remove all hooks: the model is stock again. Safe to call twice."""
        self.tower.close()
        self.layer.close()
        self.attention.close()

    def check_open(self) -> None:
        """Refuse to work after `close`.

        Raises:
            UnsupportedError: it was called.
        """
        self.layer.check_open()

    def __reduce__(self) -> Any:
        """Refused: the hooks of a copied model would go on asking this object's stations."""
        raise UnsupportedError(
            "an EfficientLMM cannot be copied or pickled: its hooks belong to one model object. "
            "Copy or save the model and make a new one: "
            "EfficientLMM(copy.deepcopy(lmm.model), lmm.processor)"
        )

    def __enter__(self) -> LMMParts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_methods(methods: Sequence[Method]) -> None:
    """Refuse methods that cannot work together.

    Raises:
        SettingsError: two methods decide at one station, one cuts the tower that the other looks
            at, or they disagree about position ids.
    """
    owners: dict[str, Method] = {}
    for method in methods:
        for station in method.owned_stations:
            if station in owners:
                raise SettingsError(
                    f"'{owners[station].name}' and '{method.name}' both decide what happens at "
                    f"the {station} station: use one of them"
                )
            owners[station] = method
    pruning = [method for method in methods if isinstance(method, PruningMethod)]
    for method in pruning:
        tower = owners.get("tower")
        if method.observes and tower is not None and tower is not method:
            raise SettingsError(
                f"'{method.name}' ranks tokens by the whole tower's attention, but "
                f"'{tower.name}' cuts tokens there: use one of them"
            )
    # Cuts inside the language model have a rule of their own.
    _check_positions(pruning, axes=False)


def _check_positions(methods: Sequence[PruningMethod], axes: bool) -> None:
    """Refuse two methods in front of the language model that mean different position rules."""
    before = [m for m in methods if {"tower", "bridge"} & set(m.owned_stations)]
    for method in before[1:]:
        rules = before[0].positions(axes), method.positions(axes)
        if rules[0] != rules[1]:
            raise SettingsError(
                f"'{before[0].name}' has position_ids='{before[0].position_ids}' and "
                f"'{method.name}' has position_ids='{method.position_ids}', which mean "
                f"'{rules[0]}' and '{rules[1]}': give both the same"
            )


def check_family(
    methods: Sequence[Method], family: Family, identity: Identity | None = None
) -> None:
    """Refuse methods that do not know the model's family, or do not fit the model if it is given.

    Raises:
        UnsupportedError: a method does not; the message names the families that it knows.
        SettingsError: position rules that the model has not, or that differ on it.
    """
    for method in methods:
        if method.families != "all" and family.name not in method.families:
            raise UnsupportedError(
                f"method '{method.name}' does not support the model family '{family.name}'. "
                f"It supports: {', '.join(method.families)}."
            )
        if isinstance(method, PruningMethod):
            method.positions(family.axes)
        if identity is not None:
            method.check_model(identity, family)
    _check_positions([m for m in methods if isinstance(m, PruningMethod)], family.axes)


@dataclass
class Prepared:
    """One request, ready to run.

    Attributes:
        tokens: the visual tokens that enter the language model, one entry per image.
        layout: where things are in the shortened prompts.
    """

    parts: LMMParts
    methods: tuple[Method, ...]
    tokens: tuple[VisualTokens, ...]
    layout: PromptLayout
    _inputs: dict[str, Any]
    _n_stock: tuple[int, ...] = ()
    _n_tower: tuple[int, ...] = ()
    _n_crops: tuple[int, ...] = ()
    _kinds: tuple[Any, ...] = ()
    _request: LayerRequest | None = None
    _attention: AttentionRequest | None = None
    _run: TowerRun | None = None
    _span: Span | None = None
    _prune_s: float = 0.0

    @property
    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model's ``forward`` or ``generate``.

        Built anew on every access, because ``generate()`` changes what it is given.
        """
        inputs = dict(self._inputs)
        if self.tokens:
            features = [tokens.features for tokens in self.tokens]
            inputs["mm_encoder_outputs"] = self.parts.family.wrap_features(features, self._kinds)
        return inputs

    @contextmanager
    def active(self) -> Iterator[None]:
        """Switch the stations inside the decoder on for this request, in this thread.

        Run every forward of the request inside one ``with`` block. One generation at a time:
        a second prefill starts the request again.
        """
        with ExitStack() as stack:
            if self._request is not None:
                stack.enter_context(self.parts.layer.active(self._request))
            if self._attention is not None:
                stack.enter_context(self.parts.attention.active(self._attention))
            yield

    def check_acted(self, new_tokens: int) -> None:
        """The model has run: refuse its result where a method should have worked and did not.

        Args:
            new_tokens: tokens that were generated, 0 for a plain forward.

        Raises:
            UnsupportedError: a method inside the language model did not see the prompt, or what
                was generated.
        """
        for request in (self._request, self._attention):
            if request is not None:
                request.check_acted(new_tokens)

    @property
    def cuts_layers(self) -> bool:
        """Whether tokens are cut inside the language model: logits are then fewer than inputs."""
        return self._request is not None and bool(self._request.cuts)

    @property
    def changes_attention(self) -> bool:
        """Whether attention inside the language model is changed."""
        return self._attention is not None

    @property
    def watches_layers(self) -> bool:
        """Whether the decoder-layer station works on this request, with or without cuts."""
        return self._request is not None

    def labels_left(self, labels: Tensor) -> Tensor:
        """Labels of the tokens whose logits the last forward returned.

        Args:
            labels: int64 [B, S'], as in ``model_inputs``.

        Returns:
            int64 [B, S''], -100 on padding.
        """
        if self._request is None:
            return labels
        layout = self._request.layout
        mask, origin = layout.mask.to(labels.device), layout.origin.to(labels.device)
        return labels.gather(1, origin).masked_fill(~mask, IGNORED_LABEL)

    def report(self) -> PruningReport:
        """What happened to each image; the decoder's part is complete after the prefill."""
        seconds: dict[str, float] = {}
        if self.tokens:
            seconds["tower_s"] = 0.0 if self._span is None else self._span.seconds
            seconds["prune_s"] = self._prune_s
            if self._request is not None:
                seconds["prune_s"] += self._request.seconds
        n_layers = len(self.parts.family.decoder.layers)
        images = tuple(
            image_report(
                tokens, sample, self._n_tower[image], n_layers, self._request, self._crops(image)
            )
            for image, (tokens, sample) in enumerate(
                zip(self.tokens, samples_of(self.layout, len(self.tokens)), strict=True)
            )
        )
        return PruningReport(
            images=images,
            seconds=seconds,
            methods=tuple(method.name for method in self.methods),
            redistribution=()
            if self._attention is None
            else self._attention.report(self.tokens, self.layout),
        )

    def _crops(self, image: int) -> CropRuns | None:
        """The tower runs of an image, where patches were cut in them."""
        if self._run is None:
            return None
        unit = self.parts.family.tower.merge_unit
        first = sum(self._n_crops[:image])
        return CropRuns(self._run, first, self._n_crops[image], unit)

    @property
    def stock_tokens(self) -> tuple[int, ...]:
        """Visual tokens (CLS counted) of every image before anything was pruned."""
        return self._n_stock


def samples_of(layout: PromptLayout, n_images: int) -> tuple[int, ...]:
    """For every image the prompt of the batch that it belongs to."""
    samples = [0] * n_images
    for sample, blocks in enumerate(layout.blocks):
        for block in blocks:
            samples[block.image] = sample
    return tuple(samples)


def prepare(
    lmm_parts: LMMParts,
    inputs: Mapping[str, Any],
    methods: Sequence[Method] = (),
    *,
    padding_side: PaddingSide = "left",
    encoded: Encoded | None = None,
) -> Prepared:
    """Run the tower and build the model inputs of one request.

    Inputs that only the stock model can run (a filled cache, features instead of pixels, another
    feature layer, a mask of another form) go to it as they are where there is nothing to prune.
    Call it under ``torch.no_grad()`` (or ``inference_mode``) unless you train.

    Args:
        lmm_parts: the model with its stations.
        inputs: processor output: input_ids [B, S] with one placeholder per stock visual token,
            attention_mask [B, S] (all ones when absent), pixel_values of the images in prompt
            order (absent for text alone), and what else the model takes.
        methods: methods of this request; none means stock.
        padding_side: side on which the shortened prompts are padded.
        encoded: the tower's outcome for the same images from `encode`, to use instead of running
            it; the pixel inputs may then be left out.

    Raises:
        SettingsError: the methods clash or do not fit the model or the number of images.
        UnsupportedError: a method does not support the model family or one of the inputs, or the
            hooks were removed.
        PromptError: placeholders do not match the images, the attention mask does not match the
            prompt, or the prompt exceeds the context.
    """
    lmm_parts.check_open()
    family = lmm_parts.family
    check_methods(methods)
    check_family(methods, family, lmm_parts.identity)
    if padding_side not in ("left", "right"):
        raise SettingsError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if encoded is not None:
        inputs = {name: inputs[name] for name in inputs if name not in family.consumed}
        inputs, visuals = family.as_tensors(inputs), encoded.visuals
    else:
        inputs, visuals = _visuals(family, inputs, methods)
    layout = uncut_layout(family, inputs, visuals, padding_side)
    prepared = Prepared(lmm_parts, tuple(methods), (), layout, dict(inputs))
    if visuals:
        prepared._kinds = tuple(visual.kind for visual in visuals)
        prepared._n_crops = tuple(visual.n_crops for visual in visuals)
        prepared._n_stock = tuple(family.tokens_of(visual) for visual in visuals)
        _encode(prepared, visuals, encoded)
        _shorten(prepared)
        _plan_layers(prepared)
        _plan_attention(prepared)
    _check_context(prepared)
    return prepared


def _visuals(
    family: Family, inputs: dict[str, Any], methods: Sequence[Method]
) -> tuple[dict[str, Any], tuple[Visual, ...]]:
    """What a request shows that runs before the model, and its inputs with lists as tensors;
    nothing where the stock model runs them as they are."""
    shows = any(name in inputs for name in family.pixel_inputs)
    if needs_stock(family, inputs, methods) or not shows:
        return inputs, ()
    inputs = family.as_tensors(inputs)
    return inputs, family.visuals(inputs)


def _owner(prepared: Prepared, station: str) -> PruningMethod | None:
    """The pruning method that decides at a station, if any."""
    for method in prepared.methods:
        if isinstance(method, PruningMethod) and station in method.owned_stations:
            return method
    return None


def _encode(prepared: Prepared, visuals: tuple[Visual, ...], encoded: Encoded | None) -> None:
    """Stations "tower" and "bridge": the tokens of every image that enter the language model."""
    parts, inputs = prepared.parts, prepared._inputs
    bridge = _owner(prepared, "bridge")
    stock = prepared._n_stock
    patches = [count - int(parts.family.keeps_cls) for count in stock]
    for method in prepared.methods:
        if isinstance(method, PruningMethod):
            method.check_request(parts.identity, patches)
    watching = [
        method
        for method in prepared.methods
        if isinstance(method, PruningMethod) and method.observes and not method.idle(stock)
    ]
    sights = watching[0].observes if watching else frozenset()
    layer = watching[0].observed_layer(parts.family) if watching else None
    owner = _owner(prepared, "tower")
    tower = run_tower(parts, inputs, visuals, owner, sights, layer, encoded)
    prepared._run = tower.run
    prepared._n_tower = tuple(len(tokens) for tokens in tower.tokens)
    prepared._span, prepared._prune_s = tower.span, tower.prune_s
    if bridge is not None:
        start = time.perf_counter()
        samples = samples_of(prepared.layout, len(tower.tokens))
        tower.tokens = reduced(bridge, parts, tower, samples)
        prepared._prune_s += time.perf_counter() - start
    prepared.tokens = tuple(tower.tokens)
    for name in parts.family.consumed:
        prepared._inputs.pop(name, None)


def _shorten(prepared: Prepared) -> None:
    """Cut the prompt to the tokens that are left; an uncut prompt goes through as it is."""
    rules = [
        method.positions(prepared.parts.family.axes)
        for method in (_owner(prepared, "tower"), _owner(prepared, "bridge"))
        if method is not None
    ]
    cut = cut_prompt(
        prepared.parts,
        prepared._inputs,
        prepared.layout,
        prepared.tokens,
        prepared._n_stock,
        original="original" in rules,
        names=[method.name for method in prepared.methods],
    )
    if cut is not None:
        prepared.layout, prepared._inputs = cut


def _plan_layers(prepared: Prepared) -> None:
    """Station "layer": cuts inside the language model, if any is left to do."""
    method, family = _owner(prepared, "layer"), prepared.parts.family
    cuts = []
    if method is not None:
        job = LayerJob(
            tokens=prepared.tokens,
            stock=prepared._n_stock,
            samples=samples_of(prepared.layout, len(prepared.tokens)),
            n_layers=len(family.decoder.layers),
            identity=prepared.parts.identity,
        )
        cuts = [
            cut
            for cut in method.layer_cuts(job)
            if any(cut.due(tokens.image, len(tokens)) for tokens in prepared.tokens)
        ]
    if cuts:
        check_visible(prepared.layout)
        check_labels(prepared._inputs)
        # generate() would guess a mask from the ids.
        prepared._inputs.setdefault(
            "attention_mask", torch.ones_like(prepared._inputs["input_ids"])
        )
    request = LayerRequest(
        prepared.layout,
        cuts,
        compact=method is not None and method.layer_positions(family.axes) == "compact",
        # Of an uncut prompt, the caller's position ids mean what they mean to the stock model.
        gaps=not family.axes
        and "position_ids" in prepared._inputs
        and bool(prepared.layout.removed.any()),
    )
    prepared._request = None if request.idle else request


def _plan_attention(prepared: Prepared) -> None:
    """Station "attention": what changes inside the language model's attention, if anything."""
    owners = [one for one in prepared.methods if "attention" in one.owned_stations]
    if not owners:
        return
    parts, layers = prepared.parts, prepared._request
    parts.attention.check_backend()
    # As at the layer station, "uncut" means the prompt as the decoder gets it.
    entering = prepared.layout
    layout = PromptLayout.of(entering.mask, entering.blocks, entering.padding_side)

    def running() -> PromptLayout:
        return layout if layers is None else layers.running_layout

    prepared._attention = owners[0].attention_request(parts.family, parts.identity, running)


def _check_context(prepared: Prepared) -> None:
    """Refuse a prompt that the language model cannot hold."""
    limit = prepared.parts.family.max_context
    positions = prepared._inputs.get("position_ids")
    if positions is None:
        positions = prompt_positions(prepared.layout.mask)
        if int(positions.max()) >= limit and prepared.parts.family.axes:
            axes = prepared.parts.family.position_axes(prepared._inputs)
            positions = positions if axes is None else axes
    longest = int(positions.max()) + 1
    if longest > limit:
        raise ContextError(
            f"the prompt takes {longest} positions, but the model's context has {limit}: shorten "
            "the text, give fewer images or frames, or prune more visual tokens"
        )
