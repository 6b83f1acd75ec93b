"""Test order: the contract with transformers runs first, it names what is missing."""

from __future__ import annotations

import pytest

FIRST = "test_contract_transformers"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the contract tests to the front; keep the order otherwise."""
    items.sort(key=lambda item: FIRST not in item.nodeid)
