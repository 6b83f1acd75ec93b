"""The picture of a sink calibration: massive activations by layer."""

from __future__ import annotations

import io
from typing import Any

from torch import Tensor

from mmlm_efficient.calibration.sinks import SinkCalibration
from mmlm_efficient.errors import require_extra
from mmlm_efficient.plots import Target, write_png

_OTHERS = "#7f7f7f"
_THRESHOLD = "#d62728"


def plot_sinks(result: SinkCalibration, path: Target = None) -> bytes:
    """Draw how massive the found dimensions are by layer, against all others, and the sinks.

    Args:
        result: of `calibrate_sinks`.
        path: PNG file to write; its folder is made if missing. None to only draw.

    Returns:
        The encoded picture.

    Raises:
        SettingsError: the path is no ".png".
        MediaError: the file cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    figure_module = require_extra("matplotlib.figure", "plots")
    figure = figure_module.Figure(figsize=(7.0, 8.0), dpi=110, layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    _draw_activity(top, result, result.first, "first token (median)")
    _draw_activity(middle, result, result.visual, "visual tokens (largest)")
    _draw_share(bottom, result)
    profile = result.profile
    kind = ", on visual tokens only" if profile.visual_only else ""
    figure.suptitle(
        f"{profile.model}: sink dimensions {', '.join(map(str, profile.dims))}{kind}",
        parse_math=False,
    )
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    data = encoded.getvalue()
    if path is not None:
        write_png(path, data)
    return data


def _draw_activity(axes: Any, result: SinkCalibration, values: Tensor, label: str) -> None:
    """|x| / RMS(x) [layers, D] of the sink dimensions, and the largest of the others."""
    dims, layers = list(result.profile.dims), range(len(values))
    for dim in dims:
        axes.plot(layers, values[:, dim].tolist(), marker="o", markersize=3, label=f"dim {dim}")
    rest = values.clone()
    rest[:, dims] = 0.0
    axes.plot(
        layers, rest.amax(dim=1).tolist(), color=_OTHERS, linestyle="--", label="largest other"
    )
    axes.axhline(result.profile.threshold, color=_THRESHOLD, linewidth=1, label="threshold")
    axes.set_ylabel(f"|x| / RMS(x)\n{label}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_share(axes: Any, result: SinkCalibration) -> None:
    """Share of the visual tokens that are sinks."""
    layers = result.profile.layers
    axes.bar([one.layer for one in layers], [100 * one.share for one in layers], color="#1f77b4")
    axes.set_ylabel("sinks, % of the\nvisual tokens")
    axes.set_xlabel("decoder layer (its input)")
    axes.grid(alpha=0.3)
