"""The maths of SparseVLM, without any model: text raters, the schedule, and recycling.

Source: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
arXiv 2410.04417, first version of its reference code (Gumpest/SparseVLMs, Apache-2.0), whose merged
tokens these functions reproduce. The reference breaks ties of the clustering by random noise; here
the lower index wins. The clustering is density peaks with nearest neighbours (DPC-KNN).

Shapes: T text tokens, V visual tokens, D dropped ones, C hidden width.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from mmlm_efficient.errors import PromptError, SettingsError
from mmlm_efficient.groups import group_means, group_members
from mmlm_efficient.pruning.attention_scores import float_products
from mmlm_efficient.tokens import top_positions

_PATCHES = 576
# Nominal tokens -> tokens kept at the three cuts of LLaVA-1.5's 576, as published.
_PUBLISHED = {
    0: (0, 0, 0),
    64: (66, 30, 17),
    96: (238, 48, 26),
    128: (303, 110, 36),
    192: (300, 200, 110),
    576: (576, 576, 576),
}
_CUTS_OF_32 = (2, 6, 15)


def rater_columns(text: Tensor, visual: Tensor) -> Tensor:
    """The text tokens that rate visual tokens: those that the image relates to more than average.

    Each visual token spreads a softmax (no scale) over the text; a text token is a rater if its
    mean share is above the mean of all. If no share is above it (all equal, as with one token), all
    text tokens are raters.

    Args:
        text: [T, C] input embeddings of the text after the image.
        visual: [V, C] input embeddings of the visual tokens.

    Returns:
        bool [T], at least one True.

    Raises:
        PromptError: there is no text after the image, or no visual token.

    Example:
        >>> rater_columns(torch.tensor([[2.0], [0.0], [0.0]]), torch.ones(4, 1)).tolist()
        [True, False, False]
    """
    if len(text) == 0 or len(visual) == 0:
        raise PromptError(
            f"SparseVLM rates visual tokens by the text after them, but the prompt has {len(text)} "
            f"such text and {len(visual)} visual token(s): put the question behind the image"
        )
    share = float_products("vd,td->vt", visual, text).softmax(dim=1).mean(dim=0)
    raters = share > share.mean()
    return raters | ~raters.any()


@dataclass(frozen=True)
class Clusters:
    """Groups of tokens, each with the token that is its centre.

    Attributes:
        positions: int64 [m], the clustered tokens, ascending.
        centres: int64 [c], positions of the centres, in the order of the merged tokens.
        assignment: int64 [m], cluster 0..c-1 of each clustered token.
    """

    positions: Tensor
    centres: Tensor
    assignment: Tensor

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Positions of each cluster, its centre included, ascending."""
        return group_members(self.positions, self.assignment, len(self.centres))


def density_peaks(hidden: Tensor, n_clusters: int) -> Clusters:
    """Cluster tokens around those that are dense and far from denser ones.

    Args:
        hidden: [m, C] tokens.
        n_clusters: how many clusters, 1..m; also the neighbours that a density is taken of.

    Returns:
        The clusters, by falling density times distance of their centres. Every cluster holds at
        least its centre. Ties: the lower index.

    Raises:
        SettingsError: n_clusters is out of range.
    """
    count, width = hidden.shape
    if not 1 <= n_clusters <= count:
        raise SettingsError(
            f"cannot form {n_clusters} clusters of {count} tokens: give a number in 1..{count}"
        )
    rows = hidden.detach().float()
    # Not by a matrix product: it would blur small distances, and equal tokens would not tie.
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / math.sqrt(width)
    nearest = distance.topk(n_clusters, dim=1, largest=False).values
    # The density is exp(log_density); its logarithm ranks alike and cannot underflow to ties.
    log_density = -nearest.square().mean(dim=1)
    denser = log_density.unsqueeze(0) > log_density.unsqueeze(1)
    separation = torch.where(denser, distance, distance.max()).amin(dim=1)
    peak = log_density + separation.log()
    centres = torch.sort(peak, descending=True, stable=True).indices[:n_clusters]
    assignment = distance[:, centres].argmin(dim=1)
    assignment[centres] = torch.arange(n_clusters, device=hidden.device)
    return Clusters(torch.arange(count, device=hidden.device), centres, assignment)


def recycle_plan(relevance: Tensor, hidden: Tensor) -> Clusters:
    """Which dropped tokens are merged, and how.

    Of D dropped tokens the floor(0.3 D) + 1 most relevant ones, m, form floor(m / 10) + 1 clusters;
    the others are lost.

    Args:
        relevance: [D] rating of the dropped tokens.
        hidden: [D, C] their hidden states.

    Returns:
        Clusters of positions 0..D-1 among the dropped tokens; none when D is 0.

    Raises:
        ValueError: relevance and hidden are of different lengths.

    Example:
        >>> plan = recycle_plan(torch.tensor([0.1, 0.3, 0.2, 0.4]), torch.eye(4))
        >>> plan.members
        ((1, 3),)
    """
    dropped = len(hidden)
    if relevance.shape != (dropped,):
        raise ValueError(
            f"relevance {list(relevance.shape)} must have one value for each of the {dropped} "
            "dropped tokens"
        )
    if dropped == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=hidden.device)
        return Clusters(nothing, nothing, nothing)
    recycled = 3 * dropped // 10 + 1
    chosen = top_positions(relevance.detach().float(), recycled)
    clusters = density_peaks(hidden[chosen], recycled // 10 + 1)
    return Clusters(chosen, chosen[clusters.centres], clusters.assignment)


def merged_features(hidden: Tensor, plan: Clusters) -> Tensor:
    """The merged token of each cluster: the sum of its members divided by (count + 1e-6).

    Args:
        hidden: [D, C] hidden states that plan's positions refer to.
        plan: the clusters.

    Returns:
        [c, C] in the dtype of hidden, in the order of the centres.

    Example:
        >>> hidden = torch.tensor([[0.0], [2.0], [9.0], [4.0]])
        >>> plan = recycle_plan(torch.tensor([0.1, 0.3, 0.2, 0.4]), hidden)
        >>> merged_features(hidden, plan).round(decimals=3).tolist()
        [[3.0]]
    """
    if len(plan.centres) == 0:
        return hidden[:0]
    means = group_means(hidden[plan.positions], plan.assignment, len(plan.centres))
    return means.to(hidden.dtype)


def schedule(keep_ratio: float) -> tuple[float, float, float]:
    """Shares of the visual tokens to keep at the three cuts.

    The published lists for nominally 192, 128, 96 and 64 of 576 tokens, as shares, with linear
    interpolation between them, up to all tokens at 1 and down to none at 0. Merged tokens come on
    top of these shares.

    Args:
        keep_ratio: nominal share of the tokens, in (0, 1].

    Returns:
        Three shares of the original number of visual tokens, not increasing.

    Raises:
        SettingsError: keep_ratio is out of range.

    Example:
        >>> [round(576 * share) for share in schedule(128 / 576)]
        [303, 110, 36]
    """
    if not 0.0 < keep_ratio <= 1.0:
        raise SettingsError(f"keep_ratio must be a number in (0, 1], got {keep_ratio!r}")
    nominal = list(_PUBLISHED)
    tokens = keep_ratio * _PATCHES
    above = bisect_left(nominal, tokens)
    low, high = nominal[above - 1], nominal[above]
    weight = (tokens - low) / (high - low)
    first, second, third = (
        ((1.0 - weight) * less + weight * more) / _PATCHES
        for less, more in zip(_PUBLISHED[low], _PUBLISHED[high], strict=True)
    )
    return first, second, third


def cut_layers(n_layers: int) -> tuple[int, int, int]:
    """The 0-based decoder layers after which tokens are cut: 2, 6 and 15 of 32, or as deep.

    Scaled by the depth and rounded (half to even). From 4 layers on they are strictly ascending,
    and at least one layer runs after the last cut.

    Args:
        n_layers: decoder layers, at least 4.

    Raises:
        SettingsError: there are fewer than 4 layers.

    Example:
        >>> cut_layers(32), cut_layers(24), cut_layers(4)
        ((2, 6, 15), (2, 4, 11), (0, 1, 2))
    """
    if n_layers < 4:
        raise SettingsError(
            f"SparseVLM cuts after three decoder layers and needs at least 4, the model has "
            f"{n_layers}: use another method"
        )
    first, second, third = (round(layer * n_layers / 32) for layer in _CUTS_OF_32)
    return first, second, third
