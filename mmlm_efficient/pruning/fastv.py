"""FastV: one cut early in the language model, by the attention of the prompt's last token.

Source: "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
Vision-Language Models", arXiv 2403.06764, and the rule of its reference code
(pkunlp-icler/FastV). Unlike there, only the one row of attention that ranks is computed, every
image of a prompt is cut on its own, and each decoding step continues with the same tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mmlm_efficient.families.base import Family, Identity
from mmlm_efficient.pruning.base import LayerJob, PruningMethod, Station
from mmlm_efficient.pruning.decoder_ranking import check_depth, last_token_attention
from mmlm_efficient.stations.layer_rows import LayerCut


class FastV(PruningMethod):
    """Cut each image once inside the language model; the defaults are the paper's.

    The layers before `layer` run on all tokens. The attention row of the last prompt token in the
    layer before it (softmax over the whole prompt, mean over heads) ranks the tokens of each image,
    and `layer` is the first to run on the kept ones. They keep their positions.

    The budget counts the tokens left behind the cut, and a ratio is one of the tokens that the
    image had before any pruning: it means the same alone and behind a method that prunes before the
    language model. An image that has no more tokens than its budget is left alone.

    Example:
        >>> method = FastV(keep_ratio=0.5)
        >>> method.layer, method.positions(axes=False)
        (2, 'original')
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = (
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for "
        "Large Vision-Language Models (arXiv 2403.06764)"
    )
    stations: ClassVar[tuple[Station, ...]] = ("layer",)
    looks_at: ClassVar[str] = "attention row of the last prompt token in one decoder layer"
    sees_prompt: ClassVar[bool] = True
    default_positions: ClassVar[Literal["compact", "original"]] = "original"
    budget_counts: ClassVar[str] = (
        "tokens of each image left behind the cut inside the language model"
    )

    layer: int = Field(
        2,
        ge=1,
        strict=True,
        description="first decoder layer (0-based) without the cut tokens, >= 1",
    )

    def check_model(self, identity: Identity, family: Family) -> None:
        """Refuse a layer that the language model does not have."""
        check_depth("layer", [self.layer], identity.decoder_layers)

    def layer_cuts(self, job: LayerJob) -> tuple[LayerCut, ...]:
        """One cut, of the output of the layer before `layer`."""
        return (LayerCut(self.layer - 1, self.budgets(job.stock), last_token_attention),)
