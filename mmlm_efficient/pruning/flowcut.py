"""FlowCut: patches are cut step by step inside the vision tower, by the flow through its CLS token.

Source: "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
arXiv 2505.19536 (NeurIPS 2025), and its reference code. Every second layer the patches with the
lowest accumulated score leave, more of them where the relay token's attention is concentrated; one
layer before the feature layer exactly the budget is left. Optionally the language model cuts once
more, by the last prompt token's attention (stage B). Unlike the reference, an image's result does
not depend on the rest of its batch, and ties go to the lower index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.families.base import Family, Identity
from mmlm_efficient.pruning.base import (
    Budget,
    LayerJob,
    PruningMethod,
    Station,
    TowerJob,
    check_per_image,
    checked_counts,
)
from mmlm_efficient.pruning.decoder_ranking import check_depth
from mmlm_efficient.pruning.flowcut_packed import MergeAlignment, PackedFlowCutPass
from mmlm_efficient.pruning.flowcut_scores import query_scores
from mmlm_efficient.pruning.flowcut_tower import FlowCutPass
from mmlm_efficient.stations.layer_rows import LayerCut, SampleRows

if TYPE_CHECKING:
    from mmlm_efficient.prepare import LMMParts

Term = Literal["attention", "semantic", "value_norm"]
ALL_TERMS: tuple[Term, ...] = ("attention", "semantic", "value_norm")


class FlowCut(PruningMethod):
    """FlowCut's settings; the defaults are the paper's.

    Example:
        >>> FlowCut(keep_tokens=64).owned_stations
        ('tower',)
        >>> FlowCut.preset("flowcut-llava15-128").keep_tokens
        128
    """

    name: ClassVar[str] = "flowcut"
    paper: ClassVar[str] = (
        "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models "
        "(arXiv 2505.19536)"
    )
    stations: ClassVar[tuple[Station, ...]] = ("tower", "layer")
    looks_at: ClassVar[str] = (
        "attention, value similarity and value norms at the relay token (CLS, or the mean of all "
        "patches) in every tower layer up to the last cut"
    )
    budget_counts: ClassVar[str] = (
        "tokens of each image; of each tile of a LLaVA-NeXT image, each temporal step of a Qwen "
        "video; of LLaVA-OneVision the whole image or video, newlines not counted"
    )

    prune_interval: int = Field(2, ge=1, strict=True, description="layers between cuts, >= 1")
    prune_start_layer: int = Field(
        0, ge=0, strict=True, description="first tower layer (0-based) whose output may be cut"
    )
    score_momentum: float = Field(
        0.5, ge=0.0, lt=1.0, description="weight of the history in the score, in [0, 1)"
    )
    score_terms: tuple[Term, ...] = Field(
        ALL_TERMS, min_length=1, description="criteria that make up the score"
    )
    relay: Literal["auto", "cls", "mean"] = Field(
        "auto", description="relay token: CLS, the mean of all patches, or CLS where there is one"
    )
    crop_sync: Literal["image", "batch"] = Field(
        "image",
        description="tiles of one image are cut alike, by the largest of their counts; 'batch' "
        "does so with the whole batch, as the reference code does: for comparison only",
    )
    schedule: Literal["adaptive", "static"] = Field(
        "adaptive", description="cuts by entropy, or by the fixed counts"
    )
    counts: tuple[int, ...] | None = Field(
        None, description="static schedule: patches left after each cut, descending to the budget"
    )
    llm_prune_layer: int | None = Field(
        None, ge=0, strict=True, description="decoder layer (0-based) whose output is cut once more"
    )
    llm_keep_tokens: Budget = Field(
        None, description="tokens to keep per image after llm_prune_layer, >= 1"
    )
    merge_alignment: MergeAlignment = Field(
        "window",
        description="Qwen towers: cut whole 2x2 squares, which become one token each, or single "
        "patches as the reference code does",
    )
    keep_newlines: bool = Field(
        False,
        description="LLaVA-NeXT: keep the newline of every row of tiles that has a token left; "
        "the reference code drops them",
    )

    @classmethod
    def preset(cls, name: str) -> FlowCut:
        """The settings of a named preset of :data:`PRESETS`.

        Raises:
            SettingsError: unknown name.
        """
        if name not in PRESETS:
            raise SettingsError(f"unknown preset '{name}'. Presets: {', '.join(PRESETS)}.")
        return cls(keep_tokens=PRESETS[name])

    @field_validator("counts", "llm_keep_tokens", mode="before")
    @classmethod
    def _check_counts(cls, value: Any, info: ValidationInfo) -> Any:
        return checked_counts(str(info.field_name), value)

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if (self.llm_prune_layer is None) != (self.llm_keep_tokens is None):
            raise SettingsError("llm_prune_layer and llm_keep_tokens belong together: give both")
        if (self.schedule == "static") != (self.counts is not None):
            raise SettingsError("schedule='static' needs counts, and only it may have counts")
        if self.counts is not None and any(
            later > earlier for earlier, later in zip(self.counts, self.counts[1:], strict=False)
        ):
            raise SettingsError(f"counts must not increase, got {list(self.counts)}")
        return self

    @property
    def keeps_newlines(self) -> bool:
        """As `keep_newlines` says."""
        return self.keep_newlines

    @property
    def owned_stations(self) -> tuple[Station, ...]:
        """The tower, and the decoder layer when stage B is on."""
        return ("tower",) if self.llm_prune_layer is None else ("tower", "layer")

    def check_model(self, identity: Identity, family: Family) -> None:
        """Refuse a layer of stage B that the language model does not have."""
        if self.llm_prune_layer is not None:
            check_depth("llm_prune_layer", [self.llm_prune_layer], identity.decoder_layers)

    def tower_pass(self, job: TowerJob) -> FlowCutPass:
        """Stage A."""
        if job.merge_unit > 1:
            return PackedFlowCutPass(self, job, self.merge_alignment)
        return FlowCutPass(self, job)

    def layer_cuts(self, job: LayerJob) -> tuple[LayerCut, ...]:
        """Stage B."""
        layer, keep = self.llm_prune_layer, self.llm_keep_tokens
        n_images = len(job.tokens)
        if layer is None or keep is None:
            return ()
        check_per_image("llm_keep_tokens", keep, n_images)
        targets = keep if isinstance(keep, tuple) else (keep,) * n_images
        return (LayerCut(layer, targets, last_token_score),)


# Budgets that the paper reports for LLaVA-1.5 (576 tokens).
PRESETS: dict[str, int] = {f"flowcut-llava15-{tokens}": tokens for tokens in (192, 128, 64, 32)}


def last_token_score(rows: SampleRows, columns: Tensor) -> Tensor:
    """Stage B's score of an image's tokens: see :func:`query_scores`."""
    last = torch.tensor([rows.last], device=columns.device)
    return query_scores(
        rows.query(last)[:, 0],
        rows.values(last)[:, 0],
        rows.keys(columns),
        rows.values(columns),
        rows.scaling,
    ).score


def calibrate_static_schedule(
    parts: LMMParts, pixel_values: Tensor, settings: FlowCut
) -> tuple[int, ...]:
    """Counts for ``schedule="static"``: the adaptive schedule's means over sample images.

    A static schedule never reads a count back from the device and is the same for every image.
    It is no longer the paper's method.

    Args:
        parts: the model.
        pixel_values: [n, 3, H, W] sample images.
        settings: FlowCut with the adaptive schedule and one budget for all images.

    Returns:
        Patches left after each cut.

    Example::

        counts = calibrate_static_schedule(parts, pixels, FlowCut(keep_tokens=64))
        method = FlowCut(keep_tokens=64, schedule="static", counts=counts)
    """
    family = parts.family
    inputs = {"pixel_values": pixel_values}
    visuals = family.visuals(inputs)
    n_tokens = family.tokens_of(visuals[0])
    budgets = settings.budgets([n_tokens] * len(visuals))
    if settings.schedule != "adaptive" or len(set(budgets)) != 1 or budgets[0] >= n_tokens:
        raise SettingsError(
            "calibration needs schedule='adaptive' and one budget below the "
            f"{n_tokens} tokens of an image"
        )
    target = budgets[0] - int(family.keeps_cls)
    tower_pass = FlowCutPass(
        settings,
        TowerJob(
            targets=(target,) * len(visuals),
            n_patches=len(visuals[0].places),
            last_cut_layer=family.last_cut_layer,
            has_cls=family.tower.has_cls,
        ),
    )
    if family.merges_patches:
        raise UnsupportedError(
            "a static schedule is calibrated for towers of one picture size: LLaVA models"
        )
    with torch.no_grad(), parts.tower.running(tower_pass) as run:
        family.run_tower(inputs, visuals)
    return tuple(
        round(sum(counts[layer + 1] for counts in run.layer_counts) / len(visuals))
        for layer in tower_pass.cut_layers
    )
