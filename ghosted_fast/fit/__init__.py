"""From a dense model and text to ghosts: the pass, the solve, and the loss of candidates."""
