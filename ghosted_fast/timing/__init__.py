"""Timing: rounds in a balanced order, ratios with intervals, and what else ran meanwhile."""
