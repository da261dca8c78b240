"""Layers out, ghosts in."""
