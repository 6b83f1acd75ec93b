"""The chart of what VAR does to pocket's accuracy."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmlm_efficient.errors import require_extra
from mmlm_efficient.plots import write_png

_MARKERS = "osD^v"


def var_chart(result: Mapping[str, Any], path: Path) -> None:
    """Draw the paired differences to the same model without VAR, overall and by question kind.

    Args:
        result: of `pocket_var`.
        path: PNG file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_module = require_extra("matplotlib.figure", "plots")
    rows = [row for row in result["rows"] if "changed" in row]
    groups = list(dict.fromkeys(row["pruning"] for row in rows))
    figure = figure_module.Figure(figsize=(9.6, 2 + 2.6 * len(groups)), dpi=110)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(groups), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        own = [row for row in rows if row["pruning"] == group]
        for number, row in enumerate(own):
            shift = 0.2 * (number - (len(own) - 1) / 2)
            _differences(axes, row, shift, _MARKERS[number % len(_MARKERS)])
        axes.axhline(0, color="0.4", linewidth=1)
        axes.set_ylabel("points")
        axes.set_title(_title(group, result["keep_ratio"]), fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize=9, ncols=3, loc="best")
    figure.suptitle(
        f"pocket with VAR less pocket without, right answers; {result['scenes']} held-out scenes, "
        "95 % intervals",
        fontsize=11,
    )
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    write_png(path, encoded.getvalue())


def _differences(axes: Any, row: Mapping[str, Any], shift: float, marker: str) -> None:
    """One setting: a point with its interval for all questions and for each kind."""
    parts = {"all": row, **row["kinds"]}
    found = [part["to_without"] for part in parts.values()]
    middles = [100 * one["difference"] for one in found]
    below = [100 * max(0.0, one["difference"] - one["interval"][0]) for one in found]
    above = [100 * max(0.0, one["interval"][1] - one["difference"]) for one in found]
    axes.errorbar(
        [place + shift for place in range(len(parts))],
        middles,
        yerr=[below, above],
        linestyle="",
        marker=marker,
        markersize=5,
        capsize=3,
        label=row["setting"],
    )
    axes.set_xticks(range(len(parts)), list(parts))


def _title(group: str, keep_ratio: float) -> str:
    return "all visual tokens" if group == "alone" else f"FlowCut, {100 * keep_ratio:g} % kept"
