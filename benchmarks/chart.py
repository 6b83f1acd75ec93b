"""The chart of pocket's accuracy against the visual tokens that are kept."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmlm_efficient.errors import require_extra
from mmlm_efficient.plots import write_png

COLOURS = {"flowcut": "#1f77b4", "uniform": "#2ca02c", "random": "#ff7f0e"}


def accuracy_chart(result: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against tokens kept, one panel per position rule.

    Args:
        result: of `pocket_accuracy`.
        path: PNG file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_module = require_extra("matplotlib.figure", "plots")
    unpruned = next(row for row in result["rows"] if row["method"] == "none")
    rows = [row for row in result["rows"] if row["method"] != "none"]
    rules = list(dict.fromkeys(row["position_ids"] for row in rows)) or ["compact"]
    figure = figure_module.Figure(figsize=(1 + 4.2 * len(rules), 4), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    budgets = sorted({row["keep_tokens"] for row in result["rows"]})
    for axes, rule in zip(panels, rules, strict=True):
        full = 100 * unpruned["overall"]["accuracy"]
        axes.axhline(full, color="0.4", linestyle="--", linewidth=1, label="unpruned")
        for method in dict.fromkeys(row["method"] for row in rows):
            line = sorted(
                (row["keep_tokens"], row["overall"])
                for row in rows
                if row["method"] == method and row["position_ids"] == rule
            )
            places = [tokens for tokens, _ in line]
            shares = [100 * overall["accuracy"] for _, overall in line]
            ends = [[100 * end for end in overall["interval"]] for _, overall in line]
            below = [max(0.0, share - low) for share, (low, _) in zip(shares, ends, strict=True)]
            above = [max(0.0, high - share) for share, (_, high) in zip(shares, ends, strict=True)]
            axes.errorbar(
                places,
                shares,
                yerr=[below, above],
                marker="o",
                capsize=3,
                color=COLOURS.get(method),
                label=method,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [str(tokens) for tokens in budgets])
        axes.minorticks_off()
        axes.set_xlabel(f"visual tokens kept of {unpruned['keep_tokens']}")
        axes.set_title(f"position_ids={rule!r}", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("right answers, %")
    panels[0].legend(fontsize=9)
    figure.suptitle(f"pocket, {result['scenes']} held-out scenes", fontsize=11)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    write_png(path, encoded.getvalue())


def methods_chart(result: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against the visual tokens of a decoder layer, averaged over the layers.

    Args:
        result: of `pocket_methods`.
        path: PNG file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_module = require_extra("matplotlib.figure", "plots")
    unpruned = next(row for row in result["rows"] if row["method"] == "none")
    rows = [row for row in result["rows"] if row["method"] != "none"]
    figure = figure_module.Figure(figsize=(8.4, 5.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    full = 100 * unpruned["overall"]["accuracy"]
    axes.axhline(full, color="0.4", linestyle="--", linewidth=1, label="unpruned")
    markers = "osD^v<>PX*hp"
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        line = sorted(
            (row["mean_decoder_tokens"], 100 * row["overall"]["accuracy"])
            for row in rows
            if row["method"] == method
        )
        baseline = method in ("random", "uniform")
        axes.plot(
            [tokens for tokens, _ in line],
            [share for _, share in line],
            marker=markers[number % len(markers)],
            linestyle=":" if baseline else "-",
            color=f"C{number}" if number < 10 else ("k", "0.6")[number % 2],
            label=method,
        )
    axes.set_xscale("log", base=2)
    ticks = [9, 18, 36, 72, 144]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens entering a decoder layer, averaged over the layers")
    axes.set_ylabel("right answers, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, ncols=2, loc="lower right")
    axes.set_title(f"pocket, {result['scenes']} held-out scenes", fontsize=11)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    write_png(path, encoded.getvalue())
