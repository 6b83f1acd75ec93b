"""Calibration: find the settings of a pruning method for a model by search, without labels."""
