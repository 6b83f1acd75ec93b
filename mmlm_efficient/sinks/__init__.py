"""VAR: attention sinks and what becomes of their share."""

from __future__ import annotations

# The methods come first: their registry imports VAR, which needs the base of all methods.
import mmlm_efficient.pruning  # noqa: F401
from mmlm_efficient.sinks.dimensions import KNOWN, Backbone, SinkSettings, sinks_for
from mmlm_efficient.sinks.profiles import SinkProfile
from mmlm_efficient.sinks.redistribution import Keys, Rule, redistribute
from mmlm_efficient.sinks.var import VAR

__all__ = [
    "KNOWN",
    "VAR",
    "Backbone",
    "Keys",
    "Rule",
    "SinkProfile",
    "SinkSettings",
    "redistribute",
    "sinks_for",
]
