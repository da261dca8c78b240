"""What corrections take where a model is swept through: memory, disk, reads and work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ghosted_fast.fit.sweep.shape import Shape

# How often a correction whose first trial and whole step are good reads the layers above the first
# gap (up and down, the trials, the step), and the head.
LAYER_READS, HEAD_READS = 4, 3
# Matrices [d, d] in fp64 that a correction holds for each ghost: sums, directions, trials, points.
_MATRICES = 12
# Files of what a correction has come to: two are kept while one is written.
_FILES = 3
# Directions that are tried side by side, and the point itself.
_SIDE_BY_SIDE = 4
# Lists of states or gradients that are there twice for a moment, below and above a layer.
_BELOW_AND_ABOVE = 2
# What autograd keeps in a layer, as multiples of what a layer takes that only computes.
_KEPT_FOR_GRADIENT = 3
# Numbers of each tensor of logits at once, and how many such tensors there are at most.
_SLICE_ELEMENTS, _SLICES = 1 << 24, 8
# Ways through the layers, in forward passes of the text that is learned from: up, up again for the
# gradient, down; and of that which is judged by, beside those side by side: the whole step.
_LEARNING, _STEPPING = 3, 1


@dataclass(frozen=True)
class Correcting:
    """How much corrections have to do.

    Attributes:
        steps: How many there are at most.
        ghosts: How many ghosts are corrected.
        layers: Layers above the first of them, at most.
        tokens: Tokens that a step learns from, padding included.
        judged: Those that it is judged by.
        pass_tokens: Those of the largest pass.
    """

    steps: int
    ghosts: int
    layers: int
    tokens: int
    judged: int
    pass_tokens: int

    def stored_bytes(self, shape: Shape) -> int:
        """Return the bytes of states, gradients and kept steps on the shelf."""
        state = shape.hidden_size * shape.itemsize
        learning = self.tokens * (self.layers + self.ghosts + _BELOW_AND_ABOVE)
        trying = self.judged * _SIDE_BY_SIDE * _BELOW_AND_ABOVE
        step = self.ghosts * shape.hidden_size**2 * (shape.itemsize + 8)
        return max(learning, trying) * state + _FILES * step

    def memory_bytes(self, shape: Shape, layers: int, inside: int, solve: int) -> int:
        """Return the most memory at any time, without the program and the shelf.

        Args:
            shape: That of the model.
            layers: Bytes of the layers that are held at once.
            inside: Bytes that a pass takes inside a layer that only computes.
            solve: Bytes that a solve takes beside its equations.
        """
        matrix = 8 * shape.hidden_size**2
        slice_of_all = min(
            max(_SLICE_ELEMENTS, shape.vocabulary), self.pass_tokens * shape.vocabulary
        )
        logits = _SLICES * slice_of_all * shape.itemsize
        bottom, top = shape.beside
        return self.ghosts * _MATRICES * matrix + max(
            layers + _KEPT_FOR_GRADIENT * inside, top + logits, bottom, solve
        )

    def read_bytes(self, shape: Shape) -> int:
        """Return what a usual step reads of the checkpoint."""
        bottom, top = shape.beside
        layers = self.layers * shape.read_layer_bytes
        return LAYER_READS * layers + HEAD_READS * top + bottom

    def operations(self, shape: Shape) -> float:
        """Return how many multiplications and additions a step does, about."""
        square = float(shape.hidden_size) ** 2
        inside = self.tokens * _LEARNING + self.judged * (_SIDE_BY_SIDE + _STEPPING)
        # The dense model's logits too, each time.
        head = self.tokens * (_LEARNING + 1) + self.judged * (_SIDE_BY_SIDE + 1 + _STEPPING + 1)
        layers = 2.0 * shape.layer_parameters * self.layers * inside
        logits = 2.0 * shape.vocabulary * shape.hidden_size * head
        sums = 6.0 * square * self.tokens * self.ghosts
        solves = 20.0 * square * shape.hidden_size * self.ghosts
        return layers + logits + sums + solves
