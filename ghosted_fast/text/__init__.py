"""Calibration and evaluation text: read, tokenised, batched, split into folds."""
