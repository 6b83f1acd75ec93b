"""VFlowOpt: prune and recycle before the language model, prune twice more inside it.

Source: "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided
Optimization", ICCV 2025, arXiv 2508.05211. One importance map, taken from the tower's last layer,
ranks the tokens at all three stages; the text has no say. Stage 0 merges the least important ones
within spatial cells, stages 1 and 2 drop tokens at the input of two decoder layers. How much each
stage keeps is a profile, found once per model and budget (``mmlm calibrate vflowopt``). Unlike the
released code, no decoder layer runs without its causal mask, and an image of which nothing is to
be dropped passes untouched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.families.base import Family, Identity
from mmlm_efficient.groups import group_sums
from mmlm_efficient.pruning.base import (
    LayerJob,
    PruningMethod,
    Scene,
    Station,
    check_per_image,
)
from mmlm_efficient.pruning.observed import Sight
from mmlm_efficient.pruning.vflowopt_plan import (
    Schedule,
    Segments,
    StageZero,
    achieved_ratio,
    default_stage_layers,
    fitting_grid,
    members_of,
    recycle,
    segments,
    stage_zero,
    together,
    untuned,
)
from mmlm_efficient.pruning.vflowopt_profiles import (
    Profile,
    checked_profile,
    profile_of,
    warn_untuned,
)
from mmlm_efficient.pruning.vflowopt_scores import (
    Anchors,
    anchors,
    patch_entropy,
    received_attention,
    recovered_pixels,
    released_entropy,
    relevance,
    with_entropy,
)
from mmlm_efficient.stations.layer_rows import LayerCut
from mmlm_efficient.tokens import VisualTokens

# How far given stage ratios may miss the budget.
_TOLERANCE = 0.01


class VFlowOpt(PruningMethod):
    """VFlowOpt's settings; the budget alone picks the model's profile.

    Example:
        >>> VFlowOpt(keep_ratio=0.25).owned_stations
        ('bridge', 'layer')
    """

    name: ClassVar[str] = "vflowopt"
    paper: ClassVar[str] = (
        "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided "
        "Optimization (arXiv 2508.05211)"
    )
    stations: ClassVar[tuple[Station, ...]] = ("bridge", "layer")
    looks_at: ClassVar[str] = (
        "head-mean attention map of one tower layer; entropy of the pixels if weighted"
    )
    merges: ClassVar[bool] = True
    observes: ClassVar[frozenset[Sight]] = frozenset({"map"})
    exact: ClassVar[bool] = False
    budget_counts: ClassVar[str] = "tokens of each image, averaged over the decoder layers"

    stage_layers: tuple[int, int] | None = Field(
        None, description="decoder layers (0-based) whose input is cut, 1 <= k1 < k2 < layers"
    )
    stage_keep_ratios: tuple[float, float, float] | None = Field(
        None, description="kept fractions of stages 0, 1 and 2, each in (0, 1], over the profile's"
    )
    anchor_threshold: float | None = Field(
        None,
        ge=0.0,
        allow_inf_nan=False,
        description="anchors receive more than this many times the mean attention",
    )
    entropy_weight: float | None = Field(
        None, ge=-1.0, le=1.0, description="weight of the patch entropy in the importance"
    )
    merge_grid_size: float | Literal["off"] | None = Field(
        None, description="side of a recycling cell in tokens, >= 1; 'off' drops instead of merging"
    )
    attention_layer: int | None = Field(
        None, ge=0, strict=True, description="tower layer (0-based) to read; the last one if unset"
    )
    entropy_mode: Literal["grayscale", "released"] = Field(
        "grayscale", description="grey levels of the entropy; 'released' repeats a slip of the code"
    )
    exact_budget: bool | None = Field(
        None,
        description="stage 0 keeps exactly its share (cells grow on small images); ragged cells "
        "else make it a little more; as the profile says if unset",
    )
    protect_recycled: bool = Field(
        False, description="a merged token ranks by its cell's total importance, not by its best"
    )
    profile: str = Field(
        "auto", min_length=1, description="built-in name, YAML file, 'auto', or 'none' (untuned)"
    )
    allow_profile_mismatch: bool = Field(
        False, description="use a named profile although it was made for another model"
    )

    @field_validator("merge_grid_size", mode="before")
    @classmethod
    def _read_off(cls, value: Any) -> Any:
        """YAML reads a bare ``off`` as false."""
        if value is True:
            raise SettingsError("merge_grid_size must be a number of at least 1 or 'off', got True")
        return "off" if value is False else value

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        for ratio in self.stage_keep_ratios or ():
            if not 0.0 < ratio <= 1.0:
                raise SettingsError(
                    f"stage_keep_ratios must be three numbers in (0, 1], got "
                    f"{list(self.stage_keep_ratios or ())}"
                )
        if self.stage_layers is not None and not 1 <= self.stage_layers[0] < self.stage_layers[1]:
            raise SettingsError(
                f"stage_layers must be rising and at least 1, got {list(self.stage_layers)}: "
                "layer 0 is never cut"
            )
        grid = self.merge_grid_size
        if not isinstance(grid, str) and grid is not None and not 1.0 <= grid < math.inf:
            raise SettingsError(f"merge_grid_size must be at least 1 or 'off', got {grid!r}")
        return self

    def check_budget(self) -> None:
        """keep_ratio, keep_tokens or stage_keep_ratios must be given, not the first two at once.

        Raises:
            SettingsError: they are not.
        """
        if self.stage_keep_ratios is None or self.keep_tokens is not None:
            super().check_budget()

    def idle(self, n_tokens: Sequence[int]) -> bool:
        """Whether nothing is dropped of images of so many tokens."""
        if self.stage_keep_ratios is not None:
            return all(ratio == 1.0 for ratio in self.stage_keep_ratios)
        ratios = [self.ratio_of(image, count) for image, count in enumerate(n_tokens)]
        return all(ratio is not None and ratio >= 1.0 for ratio in ratios)

    def layer_positions(self, axes: bool) -> Literal["compact", "original"]:
        """Behind the cuts inside the language model tokens keep their positions, always."""
        return "original"

    def check_request(self, identity: Identity, n_tokens: Sequence[int]) -> None:
        """Refuse a profile of another model, stage layers out of range, ratios off the budget."""
        for name, value in (("keep_tokens", self.keep_tokens), ("keep_ratio", self.keep_ratio)):
            check_per_image(name, value, len(n_tokens))
        for image, count in enumerate(n_tokens):
            self.schedule(identity, image, count)

    def observed_layer(self, family: Family) -> int:
        """The tower layer whose attention gives the importance.

        Raises:
            SettingsError: the tower has no such layer, or it attends to windows only.
        """
        if self.attention_layer is None:
            return super().observed_layer(family)
        family.check_observed(self.attention_layer, "attention_layer")
        return self.attention_layer

    # -- the schedule ----------------------------------------------------------------------

    def ratio_of(self, image: int, n_tokens: int) -> float | None:
        """The mean kept fraction that is asked for an image of n_tokens tokens; None where only
        stage_keep_ratios say it."""
        if self.keep_tokens is not None:
            return min(1.0, self.budget(image, n_tokens) / n_tokens)
        ratio = self.keep_ratio
        return ratio[image] if isinstance(ratio, tuple) else ratio

    def schedule(
        self, identity: Identity, image: int, n_tokens: int
    ) -> tuple[tuple[int, int], Schedule]:
        """Stage layers and ratios for one image of one model.

        Args:
            identity: the model.
            image: position of the image in the call.
            n_tokens: its tokens before pruning.

        Raises:
            SettingsError: the profile is of another model, stage layers are out of range, or
                given ratios miss the budget.
        """
        depth, asked = identity.decoder_layers, self.ratio_of(image, n_tokens)
        layers = self.stage_layers or default_stage_layers(depth)
        budget, given = asked, self.stage_keep_ratios
        if budget is None:
            budget = achieved_ratio(*(given or (1.0, 1.0, 1.0)), segments(layers, depth))
        profile = self._profile(identity, budget)
        if self.stage_layers is None and profile is not None:
            layers = profile.stage_layers
        parts = segments(layers, depth)
        found = self._found(identity, profile, budget, parts)
        mean = achieved_ratio(*found.stage_keep_ratios, parts)
        if asked is not None and abs(mean - asked) > _TOLERANCE:
            raise SettingsError(
                f"vflowopt: stages {list(layers)} with ratios "
                f"{[round(ratio, 4) for ratio in found.stage_keep_ratios]} keep {mean:.4f} of the "
                f"tokens on average over {depth} decoder layers, but keep_ratio is {asked:.4f}: "
                "give ratios that match, or leave one out"
            )
        grid = found.merge_grid_size if self.merge_grid_size is None else self.merge_grid_size
        return layers, Schedule(
            found.stage_keep_ratios,
            found.anchor_threshold if self.anchor_threshold is None else self.anchor_threshold,
            found.entropy_weight if self.entropy_weight is None else self.entropy_weight,
            None if isinstance(grid, str) else grid,
            found.exact_budget if self.exact_budget is None else self.exact_budget,
        )

    def _profile(self, identity: Identity, budget: float) -> Profile | None:
        """The profile in force; None where nothing is pruned or none is to be used or found."""
        if budget >= 1.0 or self.profile == "none":
            return None
        if self.profile == "auto":
            return profile_of(identity, budget)
        return checked_profile(self.profile, identity, self.allow_profile_mismatch)

    def _found(
        self, identity: Identity, profile: Profile | None, budget: float, parts: Segments
    ) -> Schedule:
        """The schedule before single settings override it."""
        if self.stage_keep_ratios is not None:
            own = untuned(1.0, parts) if profile is None else profile.schedule(profile.keep_ratio)
            return replace(own, stage_keep_ratios=self.stage_keep_ratios)
        if profile is not None:
            return profile.schedule(budget, parts)
        if budget < 1.0 and self.profile == "auto":
            warn_untuned(identity.name, budget)
        return untuned(budget, parts)

    # -- stage 0 ---------------------------------------------------------------------------

    def reduce(self, tokens: VisualTokens, scene: Scene) -> VisualTokens:
        """Stage 0, and the importance that the later stages rank by."""
        _, schedule = self.schedule(scene.identity, tokens.image, len(tokens))
        whole = all(ratio >= 1.0 for ratio in schedule.stage_keep_ratios)
        # Beside other images of its prompt a whole one is ranked too.
        if whole and (scene.n_together == 1 or not scene.observed):
            return tokens
        found = _anchors(scene, schedule)
        scores = self.importance_of(scene, schedule, found).to(tokens.features.device)
        places = tokens.places
        newline = places.newline.to(scores.device)
        plan = stage_zero(
            scores,
            schedule.stage_keep_ratios[0],
            self._cells(tokens, scene, schedule),
            places.source.to(scores.device),
            places.row.to(scores.device),
            places.col.to(scores.device),
            newline,
            exact_budget=schedule.exact_budget,
        )
        ranks = scores.masked_fill(newline, torch.inf)
        notes = {**_anchor_notes(found), "recycled_tokens": plan.n_cells}
        if plan.is_identity:
            return replace(tokens, scores=ranks, notes=notes)
        merged = plan.n_cells > 0
        features = recycle(tokens.features, scores, plan) if merged else tokens.features[plan.kept]
        return VisualTokens(
            features=features,
            index=plan.kept.to("cpu"),
            places=places,
            image=tokens.image,
            members=members_of(plan) if merged else None,
            scores=self._ranks(ranks, plan)[plan.kept],
            notes=notes,
        )

    def _cells(self, tokens: VisualTokens, scene: Scene, schedule: Schedule) -> float | None:
        """Side of a recycling cell; None where tokens are only dropped."""
        places, grid = tokens.places, schedule.merge_grid_size
        # Tiles of one picture are merged within cells; several pictures and frames only dropped.
        if grid is None or places.video or scene.n_together > 1:
            return None
        if not schedule.exact_budget:
            return grid
        width = int(bool(places.newline.any()))
        shapes = [(rows, cols + width) for rows, cols in places.shapes]
        keep = round(len(tokens) * schedule.stage_keep_ratios[0]) - int(places.newline.sum())
        return fitting_grid(grid, shapes, keep)

    def importance_of(
        self, scene: Scene, schedule: Schedule, found: Sequence[Anchors] | None = None
    ) -> Tensor:
        """Importance float32 [L] of an image's packed tokens, 1 on newlines.

        Args:
            scene: what is known of the image.
            schedule: the threshold and the weight of the entropy.
            found: anchors of each crop, where they are known already.
        """
        if found is None:
            found = _anchors(scene, schedule)
        # Crop by crop: a stack would be a copy of all maps.
        per_crop = torch.stack(
            [
                relevance(attention, schedule.anchor_threshold, own)
                for attention, own in zip(_maps(scene), found, strict=True)
            ]
        )
        entropy = None
        if schedule.entropy_weight != 0.0:
            key = f"entropy {self.entropy_mode}"
            if key not in scene.cache:
                scene.cache[key] = self._entropy(scene).to(per_crop.device)
            entropy = scene.cache[key]
        per_crop = with_entropy(per_crop, schedule.entropy_weight, entropy)
        return scene.pack(per_crop.unsqueeze(-1), 1.0).squeeze(-1)

    def _entropy(self, scene: Scene) -> Tensor:
        """Entropy [C, N] in bits of the pixels behind every token of every crop."""
        pixels = scene.pixels()
        patch_px = pixels.shape[-1] // scene.visual.crop_grids[0][1]
        if self.entropy_mode == "released":
            return released_entropy(pixels, patch_px)
        if scene.stats is None:
            raise SettingsError(
                "entropy_weight needs the image processor's mean and deviation to see 8-bit "
                "pixels, and this model came without a processor: set entropy_weight=0.0, or "
                "make the EfficientLMM with its processor"
            )
        return patch_entropy(recovered_pixels(pixels, *scene.stats), patch_px)

    def _ranks(self, ranks: Tensor, plan: StageZero) -> Tensor:
        """By what the later stages rank: a merged token like its carrier, or like its cell."""
        if not self.protect_recycled or plan.n_cells == 0:
            return ranks
        totals = group_sums(ranks[plan.members], plan.cell, plan.n_cells)[0]
        return ranks.index_copy(0, plan.carriers, totals)

    # -- stages 1 and 2 --------------------------------------------------------------------

    def layer_cuts(self, job: LayerJob) -> tuple[LayerCut, ...]:
        """Cuts at the input of the two stage layers."""
        found = [self.schedule(job.identity, tokens.image, tokens.n_in) for tokens in job.tokens]
        if not found:
            return ()
        layers, ratios = self._agreed(job, found)
        fixed = {tokens.image: tokens.scores for tokens in job.tokens if tokens.scores is not None}
        return tuple(
            LayerCut(
                layer - 1,
                ratios=tuple(stages[number] for stages in ratios),
                fixed=fixed,
            )
            for number, layer in enumerate(layers, start=1)
        )

    def _agreed(
        self, job: LayerJob, found: Sequence[tuple[tuple[int, int], Schedule]]
    ) -> tuple[tuple[int, int], list[tuple[float, float, float]]]:
        """Stage layers of the request, and for every image the ratios of its prompt."""
        pruned = [layers for layers, own in found if min(own.stage_keep_ratios) < 1.0]
        layers = pruned[0] if pruned else found[0][0]
        if any(other != layers for other in pruned):
            raise SettingsError(
                "vflowopt: the budgets of one batch belong to profiles with different "
                f"stage_layers ({', '.join(str(list(one)) for one in sorted(set(pruned)))}): give "
                "stage_layers, or ask in separate batches"
            )
        by_sample = {
            sample: together(
                [
                    (tokens.n_in, own.stage_keep_ratios)
                    for tokens, (_, own), other in zip(job.tokens, found, job.samples, strict=True)
                    if other == sample
                ]
            )
            for sample in set(job.samples)
        }
        return layers, [by_sample[sample] for sample in job.samples]


def _maps(scene: Scene) -> list[Tensor]:
    """Head-mean attention maps [N, N] of the image's crops."""
    return [one.map for one in scene.observed if one.map is not None]


def _anchors(scene: Scene, schedule: Schedule) -> list[Anchors]:
    """The anchors of each crop."""
    return [
        anchors(received_attention(attention), schedule.anchor_threshold)
        for attention in _maps(scene)
    ]


def _anchor_notes(found: Sequence[Anchors]) -> dict[str, Any]:
    """How many anchors each crop had, and whether one had none of its own."""
    counts = torch.stack([one.mask.sum() for one in found])
    fallback = torch.stack([one.fallback for one in found])
    return {
        "anchors_per_crop": tuple(counts.tolist()),
        "anchor_fallback": bool(fallback.any()),
    }
