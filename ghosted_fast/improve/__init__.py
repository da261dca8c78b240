"""Smaller models moved towards the dense one's predictions: corrections in closed form, healing."""
