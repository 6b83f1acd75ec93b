"""What `make test-install` runs: pocket's answers as JSON, or compared with such a file.

python -P tests/install/answers.py > checkout.json   # in the checkout's venv
python -P tests/install/answers.py checkout.json     # in a venv that has the wheel only
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import mmlm_efficient
from mmlm_efficient import VAR, EfficientLMM, FastV, FlowCut, load
from mmlm_efficient.pocket import scene

CASES = {
    "unpruned": (),
    "flowcut:36": FlowCut(keep_tokens=36),
    "fastv:36": FastV(keep_tokens=36),
    "var": VAR(sink_dims=85, sink_threshold=4.33, task_preset="hallucination", return_stats=True),
}
QUESTIONS = ("What is in the picture?", "How many objects are there?")


class Tokens(transformers.StoppingCriteria):
    """Notes the ids of prompt and answer, and never stops."""

    ids: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.ids = input_ids[0].tolist()
        return torch.zeros(1, dtype=torch.bool)


def answer(lmm: EfficientLMM, methods: Any, question: str) -> dict[str, Any]:
    """Token ids, text and kept patches; or the error, so that the other cases still run."""
    tokens = Tokens()
    image = scene("heldout", 56).image
    try:
        said = lmm.ask(question, image, methods, stopping_criteria=[tokens])
    except Exception as error:  # noqa: BLE001 - whatever a new release breaks is the finding
        return {"error": f"{type(error).__name__}: {error}"}
    kept = [one.kept.tolist() for one in said.report.images]
    # What VAR did, because not every answer shows it.
    changed = said.to_dict()["redistribution"]
    return {"text": said.text, "ids": tokens.ids, "kept": kept, "changed": changed}


def main() -> int:
    """Print the answers, or how they compare; 1 if one differs or failed."""
    torch.set_num_threads(1)
    with load("pocket", dtype="float32") as lmm:
        found = {
            f"{name}: {question}": answer(lmm, methods, question)
            for name, methods in CASES.items()
            for question in QUESTIONS
        }
    failed = [one for one in found.values() if "error" in one]
    if len(sys.argv) == 1:
        sys.stdout.write(json.dumps(found))
        return 1 if failed else 0
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"mmlm_efficient from {Path(mmlm_efficient.__file__).parent}")
    expected = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for case, one in found.items():
        print(f"{'same  ' if one == expected[case] else 'DIFFERS'} {case} {one.get('text', one)}")
        if one != expected[case]:
            print(f"        the checkout: {expected[case].get('text', expected[case])}")
    same = found == expected
    print(f"{'all' if same else 'NOT ALL'} {len(found)} answers are the checkout's, token by token")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
