"""VAR's settings: every way to write dimensions and layers, and what messages say is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmlm_efficient import VAR
from mmlm_efficient.errors import SettingsError
from mmlm_efficient.settings import as_methods

DIMS = r"var: sink_dims must be one or more different integers >= 0, such as \[1415, 2533\]"
LAYERS = r"var: layers must be one or more different numbers of layers \(integers >= 0,"
NAN = float("nan")


@pytest.mark.parametrize(
    ("written", "dims"),
    [
        (85, (85,)),
        (0, (0,)),
        (np.int64(85), (85,)),
        ("85", (85,)),
        ("85,12", (85, 12)),
        (" 1415 , 2533 ", (1415, 2533)),
        ([85, 12], (85, 12)),
        ((85, np.int64(12)), (85, 12)),
        (np.array([85, 12]), (85, 12)),
        (range(3, 5), (3, 4)),
        ({85}, (85,)),
    ],
)
def test_dimensions_and_layers_in_every_form(written: Any, dims: tuple[int, ...]) -> None:
    var = VAR(sink_dims=written, layers=written)
    assert var.sink_dims == var.layers == dims
    assert {type(one) for one in dims} == {type(one) for one in var.sink_dims} == {int}
    assert var == VAR(sink_dims=list(dims), layers=list(dims))
    assert as_methods({"name": "var", "sink_dims": written}) == (VAR(sink_dims=dims),)


@pytest.mark.parametrize("name", ["auto", "pocket", "2026-11", "sinks-7b,13b.yaml", "85.yaml"])
def test_what_is_no_number_is_a_calibration(name: str) -> None:
    assert VAR(sink_dims=name).sink_dims == name


def test_a_path_is_a_calibration() -> None:
    assert VAR(sink_dims=Path("outputs") / "sinks.yaml").sink_dims == "outputs/sinks.yaml"


@pytest.mark.parametrize(
    ("written", "got"),
    [
        (True, "True"),
        ([True], r"\[True\]"),
        ([3, False], r"\[3, False\]"),
        ([85.0], r"\[85.0\]"),
        (85.5, "85.5"),
        (NAN, "nan"),
        ([NAN], r"\[nan\]"),
        (["85"], r"\['85'\]"),
        ([[85]], r"\[\[85\]\]"),
        ({85: 1}, r"\{85: 1\}"),
        (b"85", "b'85'"),
        (-1, "-1"),
        ([-1], r"\[-1\]"),
        ([], r"\[\]"),
        ([3, 3], r"\[3, 3\]"),
        ("3,3", "'3,3'"),
        ("85,", "'85,'"),
        ("85,-1", "'85,-1'"),
        ("85.5,12", "'85.5,12'"),
        ("", "''"),
        ("9" * 5000, "'9{70,79}"),
    ],
)
def test_what_is_no_dimension_and_no_layer(written: Any, got: str) -> None:
    with pytest.raises(SettingsError, match=f"^{DIMS}.*'auto', got {got}$") as caught:
        VAR(sink_dims=written)
    assert len(str(caught.value)) < 300
    with pytest.raises(SettingsError, match=f"^{LAYERS}.*, got {got}$"):
        VAR(layers=written)


def test_layers_have_no_names() -> None:
    assert VAR(layers=None).layers is None
    with pytest.raises(SettingsError, match=f"^{LAYERS}.*, got 'auto'$"):
        VAR(layers="auto")
    with pytest.raises(SettingsError, match=f"^{DIMS}.*'auto', got None$"):
        VAR(sink_dims=None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mu", "The paper's mu is min_image_mass."),
        ("summ", "The released code's summ is min_image_mass."),
        ("tau", "The paper's tau is sink_threshold."),
        ("p", "The paper's p is redistribute_fraction;"),
    ],
)
def test_the_papers_names_are_explained(name: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        VAR(**{name: 0.2})
    assert str(caught.value).startswith(f"var: unknown setting '{name}'. {message}")
