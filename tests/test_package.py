"""The package itself: public names, and a core that needs no extra."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mmlm_efficient
from mmlm_efficient.errors import MissingExtraError, require_extra

EXTRAS = ("ray", "lmms_eval", "optuna", "matplotlib", "bitsandbytes", "fastapi", "torchvision")


def test_every_public_name_is_there() -> None:
    for name in mmlm_efficient.__all__:
        assert getattr(mmlm_efficient, name) is not None
    assert set(mmlm_efficient.__all__) <= set(dir(mmlm_efficient))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mmlm_efficient.nonsense


@pytest.mark.slow
def test_core_imports_and_answers_without_any_extra() -> None:
    """In a process where every extra is hidden, as on a machine that never installed one."""
    code = f"""
import sys
for name in {EXTRAS!r}:
    sys.modules[name] = None
import torch, mmlm_efficient, ray_serve, eval
torch.set_num_threads(1)
for name in mmlm_efficient.__all__:
    getattr(mmlm_efficient, name)
from tests.tiny import tiny_llava
from tests.tiny_processor import picture, tiny_processor
lmm = mmlm_efficient.EfficientLMM(tiny_llava(), tiny_processor(), "flowcut:9")
print(lmm.ask("where cat ?", picture(), max_new_tokens=2).usage.visual_tokens_kept["layer"])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["9"]


def test_missing_extra_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"'no_such_module'.*mmlm-efficient\[serve\]"):
        require_extra("no_such_module", "serve")
