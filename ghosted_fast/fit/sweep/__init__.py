"""Layer by layer: all text in one layer before the next is touched, so that one is in memory."""
