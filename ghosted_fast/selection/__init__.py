"""Which layers to remove, and how many."""
