"""What the generated tables of VAR say, from its result files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mmlm_efficient.machine import MIB

_BESIDE = ("var", "eager var")


class Table(NamedTuple):
    """Head and rows of a table, and what stands below it."""

    head: list[str]
    rows: list[list[str]]
    note: str


def attention(result: Mapping[str, Any]) -> Table:
    """Time and memory beside SDPA and eager VAR, from `var_attention`."""
    rows, notes = [], []
    for one in result["prompts"]:
        for part in ("model", "attention"):
            for phase in ("prefill", "decode"):
                ways = one[part][phase]
                row = [f"{one['tokens']:,}", f"{part}, {phase}"]
                row.append(f"{1000 * ways['sdpa']['median_s']:.2f}")
                row += [_to_sdpa(ways[name]) for name in _BESIDE]
                row.append(f"{ways['sdpa']['peak_bytes'] / MIB:.2f}")
                row += [f"{ways[name]['peak_bytes'] / MIB:.2f}" for name in _BESIDE]
                rows.append(row)
        changed, agreement = one["changed"]["rows_changed"], one["agreement"]
        gap = one["text_between"]
        between = f", {gap} of text between pictures" if gap else ""
        notes.append(
            f"with {one['tokens']:,} tokens ({one['visual_tokens']:,} visual{between}) VAR changes "
            f"{100 * changed:.0f} % of the rows that it may change, and its logits are within "
            f"{agreement['prefill_to_eager']:.0e} of eager VAR's"
        )
    head = ["tokens", "what", "SDPA ms", "VAR ms", "eager VAR ms"]
    head += ["SDPA peak MiB", "VAR peak MiB", "eager VAR peak MiB"]
    layers = result["var_layers"]
    note = (
        f"{result['model']}, VAR in layers {layers[0]} to {layers[-1]}; {result['dtype']}; random "
        "weights with planted sinks. 'model' is the whole language model, 'attention' the "
        "attention of one layer alone; in brackets the ratio to SDPA. Peak: tensors beyond weights "
        f"and filled cache. In detail, {'; '.join(notes)}."
    )
    return Table(head, rows, note)


def _to_sdpa(way: Mapping[str, Any]) -> str:
    return f"{1000 * way['median_s']:.2f} ({way['to_sdpa']['of_medians']:.2f}x)"


def pocket(result: Mapping[str, Any]) -> Table:
    """Accuracy with and without VAR, from `pocket_var`."""
    rows = []
    for row in result["rows"]:
        pruned = row["pruning"] != "alone"
        cells = [f"FlowCut {100 * result['keep_ratio']:g} %" if pruned else "all", row["setting"]]
        cells.append(f"{100 * row['overall']['accuracy']:.1f} %")
        if "changed" in row:
            low, high = (100 * end for end in row["to_without"]["interval"])
            difference = 100 * row["to_without"]["difference"]
            cells.append(f"{difference:+.2f} ({low:+.2f} to {high:+.2f})")
            cells.append(f"{row['scenes_better']} / {row['scenes_worse']}")
            cells.append(f"{100 * (row['changed']['rows_changed'] or 0):.1f} %")
        rows.append(cells + [""] * (6 - len(cells)))
    found = result["calibration"]
    note = (
        f"{result['scenes']:,} held-out scenes, {result['questions']:,} questions; paired "
        "differences in points with 95 % intervals. Rows changed: share of the attention rows "
        "behind the picture, over heads and active layers, in the prefill. Sink dimensions from "
        f"the calibration: {', '.join(map(str, found['dims']))}, threshold "
        f"{found['threshold']:.3g}."
    )
    head = ["visual tokens", "VAR", "right answers", "to without VAR", "scenes better / worse"]
    return Table([*head, "rows changed"], rows, note)
