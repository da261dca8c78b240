"""Whether the gradient of the predictions comes back through the layers of a quantized model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.models.contract import plain_tokens
from ghosted_fast.models.decoder import Decoder, evaluating
from ghosted_fast.models.quantized.loading import quantization_of

# Modules of bitsandbytes in 4 bits: whether they repack their weights for a processor's kernel,
# which has no gradient, in the first pass that wants none.
_REPACKS = "support_avx512bf16_for_cpu"
# What torch puts into the graph for an operator that has no gradient: it passes on zeros.
_NO_GRADIENT = "WarnNotImplemented"


@contextmanager
def kernels_with_gradients(*models: Any) -> Iterator[None]:
    """Have the layers of models use kernels that know gradients, within the context.

    Args:
        models: Any models; copies that share weights must be among them.
    """
    held = [m for model in models for m in model.modules() if getattr(m, _REPACKS, False)]
    try:
        for module in held:
            setattr(module, _REPACKS, False)
            module.state_dict()  # puts weights that were repacked back into their form
        yield
    finally:
        for module in held:
            setattr(module, _REPACKS, True)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Have autograd look at no parameter of a module, within the context."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def uses_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a ghosted and its dense model, run with kernels that know gradients."""

    @functools.wraps(function)
    def run(ghosted: Any, dense: Any, *args: Any, **kwargs: Any) -> Any:
        with kernels_with_gradients(ghosted, dense):
            return function(ghosted, dense, *args, **kwargs)

    return run


def check_gradients(model: Any) -> None:
    """Raise unless a model passes gradients back, which corrections and healing follow.

    Kernels for packed weights may know no gradient. The residual stream goes past them, so that
    nothing fails: the gradient is wrong. Each module with weights is watched in one forward pass
    of a few tokens. Models that are not quantized are not looked at.

    Args:
        model: A transformers decoder-only model.

    Raises:
        UnsupportedModelError: It does not; the message names the first such module.
    """
    kind = quantization_of(model.config)
    if kind is None:
        return
    decoder = Decoder.of(model)
    broken: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [t for t in _tensors((args, kwargs)) if t.requires_grad]
            made = [t for t in _tensors(output) if t.is_floating_point()]
            if given and made and not any(_has_gradient(t) for t in made):
                broken.append(name)

        return hook

    handles = [
        module.register_forward_hook(look(name), with_kwargs=True)
        for name, module in decoder.layers.named_modules()
        if _holds_weights(module)
    ]
    embedded = model.get_input_embeddings().register_forward_hook(
        lambda _, __, output: output.detach().requires_grad_()
    )
    try:
        with (
            frozen(model),
            kernels_with_gradients(model),
            evaluating(model),
            torch.enable_grad(),
        ):
            logits = model(plain_tokens(model), use_cache=False)[0]
            logits.float().square().mean().backward()
    except RuntimeError as error:
        raise UnsupportedModelError(_refusal(kind, str(error).split("\n")[0])) from error
    finally:
        for handle in (*handles, embedded):
            handle.remove()
    if broken:
        raise UnsupportedModelError(_refusal(kind, f"layer module {broken[0]} passes none back"))


def _refusal(kind: str, reason: str) -> str:
    return (
        f"expected a model that passes gradients back, which corrections and healing follow, "
        f"got one quantized by {kind} that does not ({reason}): unpack its weights on loading "
        "(from_pretrained with a quantization config of dequantize=True, for fp8, MXFP4 and "
        "compressed-tensors), or make no corrections (corrections=0, --corrections 0)"
    )


def _holds_weights(module: nn.Module) -> bool:
    """Return whether a module has weights of its own, packed or not."""
    packed = any(not item.is_floating_point() for item in module.buffers(recurse=False))
    return packed or next(module.parameters(recurse=False), None) is not None


def _has_gradient(tensor: Tensor) -> bool:
    maker = tensor.grad_fn
    return tensor.requires_grad and (maker is None or not maker.name().endswith(_NO_GRADIENT))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in _tensors(entry)]
    return []
