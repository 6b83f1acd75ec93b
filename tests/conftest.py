"""Test order, threads, and no network."""

from __future__ import annotations

import os

# Before transformers is imported: nothing here may ask a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

FIRST = "test_contract_transformers"

# The models are tiny: a second thread only costs, and a lot on a busy machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the contract with transformers to the front: it names what is missing."""
    items.sort(key=lambda item: FIRST not in item.nodeid)
