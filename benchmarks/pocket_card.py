"""Accuracy of pocket on held-out videos, and its model card from this and `pocket_accuracy`.

python -m benchmarks.pocket_card
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import positive
from benchmarks.intervals import wilson
from mmlm_efficient import load
from mmlm_efficient.errors import MMLMError
from mmlm_efficient.files import write_json
from mmlm_efficient.loading import find_folder
from mmlm_efficient.machine import provenance
from mmlm_efficient.pocket.evaluate import evaluate_videos
from mmlm_efficient.pocket.train import write_card

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0, or 1 when the model or the accuracies on pictures are not there.
    """
    parser = argparse.ArgumentParser(
        prog="mmlm bench pocket_card", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--videos", type=positive, default=300, help="default 300")
    parser.add_argument("--model", default="pocket", help="pocket, or a folder of the same kind")
    parser.add_argument("--pictures", type=Path, default=RESULTS / "pocket_accuracy.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "pocket_videos.json")
    options = parser.parse_args(argv)
    if not options.pictures.is_file():
        print(f"{options.pictures} is missing: run mmlm bench pocket_accuracy", file=sys.stderr)
        return 1
    try:
        with load(options.model, dtype="float32") as lmm:
            counts = evaluate_videos(lmm.model, lmm.processor, videos=options.videos)
    except MMLMError as error:
        print(f"mmlm: {error}", file=sys.stderr)
        return 1
    kinds = {
        kind: {
            "count": total,
            "accuracy": round(right / total, 4),
            "interval": wilson(right, total),
        }
        for kind, (right, total) in counts.items()
    }
    result = {
        "benchmark": "pocket_videos",
        **provenance(torch.device("cpu")),
        "videos": options.videos,
        "kinds": kinds,
    }
    write_json(options.out, result)
    pictures = json.loads(options.pictures.read_text(encoding="utf-8"))
    write_card(find_folder(options.model), pictures, result)
    for kind, entry in kinds.items():
        print(f"{kind:16s} {entry['accuracy']:6.1%} of {entry['count']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
