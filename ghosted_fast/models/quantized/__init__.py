"""Models whose weights are packed: the names in their settings, and the way to save them."""
