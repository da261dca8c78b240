"""The sums that a ghost is solved from, and the solve. Knows tensors, never models."""
