"""Test order, threads, no network, and the tiny model that most tests of requests use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Before transformers is imported: nothing here may ask a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

if TYPE_CHECKING:
    from mmlm_efficient import EfficientLMM

FIRST = "test_contract_transformers"

# The models are tiny: a second thread only costs, and a lot on a busy machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the contract with transformers to the front: it names what is missing."""
    items.sort(key=lambda item: FIRST not in item.nodeid)


@pytest.fixture(scope="module")
def lmm() -> Iterator[EfficientLMM]:
    """A tiny LLaVA with random weights that prunes nothing unless a request says so."""
    # Not above: when a new transformers breaks an import, the contract is to say so.
    from mmlm_efficient import EfficientLMM
    from tests.tiny import tiny_llava
    from tests.tiny_processor import tiny_processor

    with EfficientLMM(tiny_llava(), tiny_processor()) as wrapped:
        yield wrapped
