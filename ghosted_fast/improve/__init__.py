"""Ghosts moved towards the dense model's predictions: closed-form corrections, and training."""
