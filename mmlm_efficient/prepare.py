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
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmlm_efficient.errors import PromptError, SettingsError, UnsupportedError
from mmlm_efficient.families import Family, family_of
from mmlm_efficient.inputs import needs_stock, uncut_layout
from mmlm_efficient.pruning.base import Method, PruningMethod, TowerJob
from mmlm_efficient.stations.bridge import (
    IGNORED_LABEL,
    PaddingSide,
    PromptLayout,
    check_labels,
    check_visible,
    prompt_positions,
    shortened,
)
from mmlm_efficient.stations.layer import LayerRequest, LayerStation
from mmlm_efficient.stations.tower import TowerPass, TowerRun, TowerStation
from mmlm_efficient.tokens import CLS_INDEX, ImageReport, PruningReport, VisualTokens, kept_patches


class LMMParts:
    """A model, its family and the stations on it. Built once per model, closed when done.

    Args:
        model: a transformers model of a supported family.

    Raises:
        UnsupportedError: no family knows the model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.family: Family = family_of(model)
        self.tower = TowerStation(self.family.tower)
        self.layer = LayerStation(self.family.decoder)

    def close(self) -> None:
        """Remove all hooks: the model is stock again. Safe to call twice."""
        self.tower.close()
        self.layer.close()

    def check_open(self) -> None:
        """Refuse to work after `close`.

        Raises:
            UnsupportedError: it was called.
        """
        self.layer.check_open()

    def __enter__(self) -> LMMParts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_methods(methods: Sequence[Method]) -> None:
    """Refuse methods that cannot work together.

    Raises:
        SettingsError: two methods decide at one station, or disagree about position ids.
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
    for method in pruning[1:]:
        if method.position_ids != pruning[0].position_ids:
            raise SettingsError(
                f"'{pruning[0].name}' has position_ids='{pruning[0].position_ids}' and "
                f"'{method.name}' has position_ids='{method.position_ids}': give both the same"
            )


def check_family(methods: Sequence[Method], family: Family) -> None:
    """Refuse methods that do not know the model's family.

    Raises:
        UnsupportedError: a method does not; the message names the families that it knows.
    """
    for method in methods:
        if method.families != "all" and family.name not in method.families:
            raise UnsupportedError(
                f"method '{method.name}' does not support the model family '{family.name}'. "
                f"It supports: {', '.join(method.families)}."
            )


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
    _n_tower: tuple[int, ...] = ()
    _request: LayerRequest | None = None
    _run: TowerRun | None = None
    _seconds: dict[str, float] = field(default_factory=dict)

    @property
    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model's ``forward`` or ``generate``.

        Built anew on every access, because ``generate()`` changes what it is given.
        """
        inputs = dict(self._inputs)
        if self.tokens:
            features = [tokens.features for tokens in self.tokens]
            inputs["mm_encoder_outputs"] = {"image": self.parts.family.wrap_features(features)}
        return inputs

    @contextmanager
    def active(self) -> Iterator[None]:
        """Switch the decoder-layer station on for this request, in this thread.

        Run every forward of the request inside one ``with`` block. One generation at a time:
        a second prefill starts the request again.
        """
        if self._request is None:
            yield
            return
        with self.parts.layer.active(self._request):
            yield

    @property
    def cuts_layers(self) -> bool:
        """Whether tokens are cut inside the language model: logits are then fewer than inputs."""
        return self._request is not None and bool(self._request.cuts)

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
        seconds = dict(self._seconds)
        if self._request is not None:
            seconds["prune_s"] += self._request.seconds
        images = tuple(self._image_report(image) for image in range(len(self.tokens)))
        return PruningReport(images, seconds, tuple(method.name for method in self.methods))

    def _image_report(self, image: int) -> ImageReport:
        tokens, run, request = self.tokens[image], self._run, self._request
        sample = next(
            row
            for row, blocks in enumerate(self.layout.blocks)
            if any(block.image == image for block in blocks)
        )
        index = tokens.index
        cuts: list[tuple[int, int]] = []
        if request is not None:
            if image in request.kept:
                index = index[request.kept[image].to(index.device)]
            cuts = list(zip(request.cut_layers, request.counts.get(image, []), strict=False))
        per_layer, entering = [], len(tokens)
        for layer in range(len(self.parts.family.decoder.layers)):
            per_layer.append(entering)
            entering = next((left for cut, left in cuts if cut == layer), entering)
        details: dict[str, Any] = {}
        # An image with nothing to prune reports as if alone, when no pass runs at all.
        if run is not None and len(run.kept[image]) < tokens.n_in:
            tower_pass = run.tower_pass
            details = {
                "layer_counts": tuple(run.layer_counts[image]),
                "cut_layer": run.cut_layer[image].to("cpu"),
            }
            if tower_pass.scores is not None:
                details["scores"] = tower_pass.scores[image].detach().to("cpu")
            if tower_pass.entropy_ratios:
                details["entropy_ratios"] = tuple(tower_pass.entropy_ratios[image])
        return ImageReport(
            image=image,
            sample=sample,
            grid=tokens.grid,
            n_in=tokens.n_in,
            kept=kept_patches(index),
            per_station={"tower": self._n_tower[image], "bridge": len(tokens), "layer": entering},
            decoder_layer_tokens=tuple(per_layer),
            **details,
        )


def prepare(
    lmm_parts: LMMParts,
    inputs: Mapping[str, Any],
    methods: Sequence[Method] = (),
    *,
    padding_side: PaddingSide = "left",
) -> Prepared:
    """Run the tower and build the model inputs of one request.

    Inputs that only the stock model can run (a filled cache, features instead of pixels, another
    feature layer, a mask of another form) go to it as they are where there is nothing to prune.
    Call it under ``torch.no_grad()`` (or ``inference_mode``) unless you train.

    Args:
        lmm_parts: the model with its stations.
        inputs: processor output: input_ids [B, S] with one placeholder per stock visual token,
            attention_mask [B, S] (all ones when absent), pixel_values [n_images, 3, H, W] in
            prompt order (absent for text alone), and what else the model takes.
        methods: methods of this request; none means stock.
        padding_side: side on which the shortened prompts are padded.

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
    check_family(methods, family)
    if padding_side not in ("left", "right"):
        raise SettingsError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    inputs = {name: value for name, value in inputs.items() if value is not None}
    stock = needs_stock(family, inputs, methods)
    pixel_values = None if stock else inputs.pop("pixel_values", None)
    layout = uncut_layout(family, inputs, pixel_values, padding_side)
    prepared = Prepared(lmm_parts, tuple(methods), (), layout, dict(inputs))
    if pixel_values is not None:
        _encode(prepared, pixel_values)
        _bridge(prepared, pixel_values)
        _shorten(prepared)
        _plan_layers(prepared)
    _check_context(prepared)
    return prepared


def _owner(prepared: Prepared, station: str) -> PruningMethod | None:
    """The pruning method that decides at a station, if any."""
    for method in prepared.methods:
        if isinstance(method, PruningMethod) and station in method.owned_stations:
            return method
    return None


def _encode(prepared: Prepared, pixel_values: Tensor) -> None:
    """Station "tower": features and provenance of every image."""
    parts, family = prepared.parts, prepared.parts.family
    grid, lead = family.grid(pixel_values), int(family.keeps_cls)
    start = time.perf_counter()
    tower_pass = _tower_pass(prepared, len(pixel_values), grid)
    everything = torch.arange(grid[0] * grid[1], device=pixel_values.device)
    kept = [everything] * len(pixel_values)
    if tower_pass is None:
        features = family.encode(pixel_values)
    else:
        with parts.tower.running(tower_pass) as run:
            features = family.encode(pixel_values)
        prepared._run, kept = run, run.kept
    if pixel_values.is_cuda:
        torch.cuda.synchronize(pixel_values.device)
    cls = everything.new_full((lead,), CLS_INDEX)
    prepared.tokens = tuple(
        VisualTokens(rows[: len(index) + lead], torch.cat([cls, index]), grid, image)
        for image, (rows, index) in enumerate(zip(features, kept, strict=True))
    )
    prepared._n_tower = tuple(len(tokens) for tokens in prepared.tokens)
    prepared._seconds = {
        "tower_s": time.perf_counter() - start,
        "prune_s": 0.0 if prepared._run is None else prepared._run.seconds,
    }


def _tower_pass(prepared: Prepared, n_images: int, grid: tuple[int, int]) -> TowerPass | None:
    """The pass of the tower's owner, or None when no image has anything to prune."""
    method, family = _owner(prepared, "tower"), prepared.parts.family
    if method is None:
        return None
    n_tokens = family.tokens_per_image(grid)
    budgets = method.budgets([n_tokens] * n_images)
    if all(budget >= n_tokens for budget in budgets):
        return None
    lead = int(family.keeps_cls)
    return method.tower_pass(
        TowerJob(
            targets=tuple(budget - lead for budget in budgets),
            n_patches=grid[0] * grid[1],
            last_cut_layer=family.last_cut_layer,
            has_cls=family.tower.has_cls,
        )
    )


def _bridge(prepared: Prepared, pixel_values: Tensor) -> None:
    """Station "bridge": select among the tokens of every image."""
    method = _owner(prepared, "bridge")
    if method is None:
        return
    start = time.perf_counter()
    lead = int(prepared.parts.family.keeps_cls)
    budgets = method.budgets([len(tokens) for tokens in prepared.tokens])
    selected = []
    for image, budget in enumerate(budgets):
        tokens = prepared.tokens[image]
        # A CLS token always stays, and is one of the budget.
        if budget < len(tokens) or not method.exact:
            patches = tokens.take(torch.arange(lead, len(tokens)))
            wanted = max(0, budget - lead)
            keep = method.select(patches, wanted, pixel_values[image])
            if keep is not None:
                keep = _checked_selection(method, keep, patches, wanted)
                tokens = tokens.take(torch.cat([torch.arange(lead), keep + lead]))
        selected.append(tokens)
    prepared.tokens = tuple(selected)
    prepared._seconds["prune_s"] += time.perf_counter() - start


def _checked_selection(
    method: PruningMethod, keep: Tensor, patches: VisualTokens, budget: int
) -> Tensor:
    """A method's selection on the CPU, refused unless it is what ``select`` has to return."""
    where = f"method '{method.name}', image {patches.image}: select() must return"
    whole = isinstance(keep, Tensor) and keep.dtype in (torch.int64, torch.int32)
    if not whole or keep.ndim != 1:
        got = f"{list(keep.shape)} of {keep.dtype}" if isinstance(keep, Tensor) else type(keep)
        raise SettingsError(f"{where} a tensor of int64 positions [{budget}], got {got}")
    keep = keep.detach().to("cpu", torch.int64)
    if method.exact and len(keep) != budget:
        raise SettingsError(f"{where} exactly {budget} positions (the budget), got {len(keep)}")
    if bool((keep.diff() <= 0).any()):
        raise SettingsError(f"{where} positions in ascending order, each once: sort them")
    if len(keep) and not 0 <= int(keep[0]) <= int(keep[-1]) < len(patches):
        raise SettingsError(
            f"{where} positions from 0 to {len(patches) - 1} among the tokens that it was given "
            f"(not patch indices), got {int(keep[0])} to {int(keep[-1])}"
        )
    return keep


def _shorten(prepared: Prepared) -> None:
    """Cut the prompt to the tokens that are left; an uncut prompt goes through as it is."""
    family = prepared.parts.family
    lead = int(family.keeps_cls)
    keep = {
        tokens.image: tokens.index + lead
        for tokens in prepared.tokens
        if len(tokens) < family.tokens_per_image(tokens.grid)
    }
    if not keep:
        return
    check_visible(prepared.layout)
    prepared.layout, source = prepared.layout.cut(keep)
    config = prepared.parts.model.config
    pad = getattr(config, "pad_token_id", None)
    if pad is None:
        pad = getattr(config.get_text_config(), "pad_token_id", None)
    prepared._inputs = shortened(
        prepared._inputs,
        prepared.layout,
        source,
        pad_token_id=0 if pad is None else int(pad),
        original_positions=_keeps_positions(prepared),
    )


def _keeps_positions(prepared: Prepared) -> bool:
    """Whether kept tokens keep their position ids."""
    return any(
        isinstance(method, PruningMethod) and method.position_ids == "original"
        for method in prepared.methods
    )


def _plan_layers(prepared: Prepared) -> None:
    """Station "layer": cuts inside the language model, if any is left to do."""
    method = _owner(prepared, "layer")
    cuts = []
    if method is not None:
        n_layers = len(prepared.parts.family.decoder.layers)
        cuts = [
            cut
            for cut in method.layer_cuts(len(prepared.tokens), n_layers)
            if any(len(tokens) > cut.targets[tokens.image] for tokens in prepared.tokens)
        ]
    if cuts:
        check_visible(prepared.layout)
        check_labels(prepared._inputs)
        # generate() would guess a mask from the ids.
        prepared._inputs.setdefault(
            "attention_mask", torch.ones_like(prepared._inputs["input_ids"])
        )
    original = _keeps_positions(prepared)
    request = LayerRequest(
        prepared.layout,
        cuts,
        compact=not original,
        # Of an uncut prompt, the caller's position ids mean what they mean to the stock model.
        gaps="position_ids" in prepared._inputs and bool(prepared.layout.removed.any()),
    )
    prepared._request = None if request.idle else request


def _check_context(prepared: Prepared) -> None:
    """Refuse a prompt that the language model cannot hold."""
    limit = prepared.parts.family.max_context
    positions = prepared._inputs.get("position_ids")
    if positions is None:
        positions = prompt_positions(prepared.layout.mask)
    longest = int(positions.max()) + 1
    if longest > limit:
        raise PromptError(
            f"the prompt takes {longest} positions, but the model's context has {limit}: shorten "
            "the text, give fewer images, or prune more visual tokens"
        )
