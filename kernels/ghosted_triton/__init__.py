"""Triton kernels of the operators, for CUDA devices.

Imported as `ghosted_fast.kernels`, lazily and only by `ghosted_fast.ops`, where triton is.
The kernels are plain functions of tensors: they check nothing that `ops/operands.py` checks.
"""
