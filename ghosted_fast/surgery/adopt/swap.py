"""Other people's ghosts, in modules and in hooks, made ours in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast.checkpoint.record import refresh_record
from ghosted_fast.errors import ArgumentError, UnknownFamilyError, UnsupportedModelError
from ghosted_fast.models.decoder import evaluating
from ghosted_fast.models.families import decoder_layers, decoder_of, final_norm, hidden_size
from ghosted_fast.models.ghost_linear import GhostLinear, square_size
from ghosted_fast.models.ghosted_layers import (
    INPUT,
    OUTPUT,
    attach_ghosts,
    check_swappable,
    ghost_of,
)
from ghosted_fast.models.runtime_classes import bases_of, maker, subclass_for
from ghosted_fast.surgery.adopt.hook_proof import Hook, Proof, hooks_of, prove
from ghosted_fast.surgery.adopt.hook_search import matrices_of, operator_in
from ghosted_fast.surgery.adopt.readings import Affine
from ghosted_fast.surgery.cut import adopt_removal

# How far a module's output may be from a form it is taken to compute, relative to that output.
_PROBE_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# transformers records hidden states by hooks of its own. They see a ghost's output, as they should.
_RECORDERS = "transformers.utils.output_capturing"

Chosen = Callable[[str, nn.Module], bool]


def swap_ghosts(
    model: nn.Module,
    match: Chosen | Iterable[str] | None = None,
    removed: Iterable[int] | None = None,
) -> list[str]:
    """Turn other people's ghosts into `GhostLinear`, in place.

    *In modules*: an `nn.Linear` [d, d] that is the full operator y = W x + b, and a module around a
    single such layer that computes y = W x + b or y = x + W x + b, alone or as a tuple of one.
    Which form a module has is found by running it on random input. Each module goes on computing
    what it computed, keeps its hooks, and stays the same object, so that code which holds it (a
    forward hook, a wrapper) needs no change.

    *In hooks*: a forward hook of a decoder layer, or a forward pre-hook of one or of the final
    norm, that computes y = W x + b or y = x + M x + b with a matrix that it can reach, transposed
    or not. It is run on random hidden states to prove that. It is then removed, and a ghost of the
    model's dtype put behind the layer before the gap (as its `ghost`; before the first layer as its
    `input_ghost`). Several such hooks in one place become one ghost. An operator that the hooked
    layer held for its hook alone is deleted. A hook that reaches no matrix [d, d] is never run.

    Args:
        model: The model that holds the ghosts.
        match: Which modules are ghosts, and which modules' hooks: their names, or a function of
            name and module. None takes the modules with "ghost" in their name or class name, those
            that stand among the decoder layers, and all hooks of decoder layers; attention and MLP
            projections are never taken unless they are named.
        removed: The layers that were removed, as the dense model numbers them. Given these, the
            model becomes a ghosted model, which saves and loads with its ghosts: its layers are
            numbered anew, its configuration follows, and the operators that hooks used are deleted
            wherever the model holds them. Only ghosts in hooks are taken then.

    Returns:
        The names of the swapped modules, and of the ghosts that were put in the place of hooks.
        Without `match`, modules of no known form are left alone.

    Raises:
        ArgumentError: A module that `match` names does not exist or has no known form; a hook holds
            a matrix and computes something else with it, or runs in an order with other hooks that
            the ghost could not keep; `removed` does not fit. For a hook's sake nothing is changed
            before all hooks are found to be right.
        UnsupportedModelError: A hooked layer's `forward` was replaced on the layer itself.
    """
    modules = dict(model.named_modules())
    if match is None or callable(match):
        chosen = match or _looks_like_ghost(model)
        names = [name for name, module in modules.items() if name and chosen(name, module)]
    else:
        names = list(match)
        unknown = [name for name in names if name not in modules]
        if unknown:
            raise ArgumentError(f"expected names of modules of the model, got {unknown}")
    hooks_chosen = (lambda *_: True) if match is None else (lambda name, _: name in names)
    found = _find_hooks(model, hooks_chosen)
    proofs = [proof for _, row in found for proof in row]
    hooked = {proof.hook.name for proof in proofs}
    if removed is not None:
        others = [] if match is None else sorted({*names} - hooked)
        if others or not found:
            raise ArgumentError(
                f"expected ghosts in hooks with removed=, got {others or 'no such hook'}: give the "
                "operators to import_ghosts instead"
            )
        adopt_removal(model, removed, [boundary for boundary, _ in found])
    swapped = _replace_hooks(model, found, everywhere=removed is not None) if found else []
    if removed is not None:
        refresh_record(model)
        return swapped
    for name in names:
        inside = any(name.startswith(f"{outer}.") for outer in swapped)
        if inside or isinstance(modules[name], GhostLinear) or name in hooked:
            continue
        if any(_holds(modules[name], proof.matrix) for proof in proofs):
            continue
        if _swap(modules[name]):
            swapped.append(name)
        elif match is not None:
            raise ArgumentError(
                f"expected {name!r} to be a square nn.Linear, or a module that returns W x + b or "
                "x + W x + b with one such layer inside, or a decoder layer with a hook that does, "
                f"got {modules[name]}"
            )
    return swapped


def _find_hooks(model: Any, chosen: Chosen) -> list[tuple[int, list[Proof]]]:
    """Return the boundaries at which hooks stand for ghosts, and the hooks, in the order they run.

    Nothing is changed, and all that could hinder a change is found.
    """
    try:
        layers = decoder_layers(model)
    except (TypeError, UnknownFamilyError, UnsupportedModelError):
        return []
    size = hidden_size(model)
    names = {id(module): name for name, module in model.named_modules()}
    found: list[tuple[int, list[Proof]]] = []
    for boundary in range(len(layers) + 1):
        index, side = _place(boundary)
        chain = _chain(model, layers, names, boundary)
        device = _device_of(layers[index], model)
        proofs = []
        for hook in chain:
            looked_at = chosen(hook.name, hook.module)
            matrices = matrices_of(hook.function, hook.module, size) if looked_at else []
            proof = prove(hook, matrices, model.dtype, device) if matrices else None
            proofs += [proof] if proof is not None else []
        if not proofs:
            continue
        _check_order(chain, [proof.hook for proof in proofs], at_start=boundary == 0)
        check_swappable(layers[index])
        if ghost_of(layers[index], side) is not None:
            raise ArgumentError(
                f"expected no ghost where {proofs[0].hook} has one, got a GhostLinear at the "
                f"{side} of {names[id(layers[index])]!r}: remove one of the two"
            )
        found.append((boundary, proofs))
    return found


def _place(boundary: int) -> tuple[int, str]:
    """Return the layer that holds a boundary's ghost, and its side."""
    return (0, INPUT) if boundary == 0 else (boundary - 1, OUTPUT)


def _device_of(layer: nn.Module, model: Any) -> torch.device:
    """Return where a layer runs; that of the model for one without weights."""
    found: torch.device = next((item.device for item in layer.parameters()), model.device)
    return found


def _replace_hooks(model: Any, found: list[tuple[int, list[Proof]]], everywhere: bool) -> list[str]:
    """Put ghosts in the place of hooks, and return their names.

    Args:
        model: The model.
        found: What `_find_hooks` returned.
        everywhere: Whether to delete the operators from all of the model, or from hooked layers.
    """
    layers = decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    placed = []
    for boundary, proofs in found:
        whole = reduce(Affine.then, (proof.affine() for proof in proofs))
        index, side = _place(boundary)
        device = _device_of(layers[index], model)
        placed.append((index, side, whole.to_ghost(model.dtype, device)))
    for _, proofs in found:
        for proof in proofs:
            proof.hook.remove()
            for holder in list(model.modules()) if everywhere else (proof.hook.module,):
                _delete_operator(holder, proof.matrix)
    attach_ghosts(model.base_model, decoder_of(model), layers, placed)
    return [
        f"{names[id(layers[index])]}.{'ghost' if side == OUTPUT else 'input_ghost'}"
        for index, side, _ in placed
    ]


def _chain(model: Any, layers: nn.ModuleList, names: dict[int, str], boundary: int) -> list[Hook]:
    """Return the hooks that hidden states meet at a boundary, in the order they run."""
    chain: list[Hook] = []
    if boundary > 0:
        before = layers[boundary - 1]
        chain += hooks_of(names[id(before)], before, is_pre=False)
    behind = layers[boundary] if boundary < len(layers) else final_norm(model)
    chain += hooks_of(names[id(behind)], behind, is_pre=True)
    return [hook for hook in chain if getattr(hook.function, "__module__", "") != _RECORDERS]


def _check_order(chain: list[Hook], ghosts: list[Hook], at_start: bool) -> None:
    """Raise unless a ghost inside the layer runs in the same order with the other hooks."""
    count = len(ghosts)
    expected = chain[-count:] if at_start else chain[:count]
    others = [hook for hook in expected if hook not in ghosts]
    if others:
        raise ArgumentError(
            f"expected no other hook {'behind' if at_start else 'before'} {ghosts[0]}, since a "
            f"ghost runs inside the layer, got {others[0]}: remove that one, swap, and register it "
            "again"
        )


def _delete_operator(holder: nn.Module, matrix: Tensor) -> None:
    """Delete what a module holds of an operator, unless its own code may use it."""
    code = getattr(inspect.unwrap(type(holder).forward), "__code__", None)
    own = code.co_names if code else ()
    for name, child in list(holder._modules.items()):
        if child is not None and name not in own and _holds(child, matrix):
            del holder._modules[name]
    for table in (holder._parameters, holder._buffers):
        for name, tensor in list(table.items()):
            if tensor is matrix and name not in own:
                delattr(holder, name)


def _holds(module: nn.Module, matrix: Tensor) -> bool:
    """Return whether a module is an operator with this very matrix."""
    operator = operator_in(module, matrix.shape[0])
    return bool(operator) and operator[0] is matrix


def _looks_like_ghost(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    try:
        layers = list(decoder_layers(model))
    except (TypeError, UnknownFamilyError, UnsupportedModelError):
        layers = []
    linear = {id(layer) for layer in layers if _linear_inside(layer) is not None}
    if len(linear) == len(layers):
        linear = set()

    def chosen(name: str, module: nn.Module) -> bool:
        own_name = name.rpartition(".")[2] + type(module).__name__
        return "ghost" in own_name.lower() or id(module) in linear

    return chosen


def _linear_inside(module: nn.Module) -> nn.Linear | None:
    """Return the square layer that a module is, or that is all it consists of."""
    parts = [part for part in module.modules() if part._parameters or part._buffers]
    if len(parts) != 1 or not isinstance(parts[0], nn.Linear) or square_size(parts[0]) is None:
        return None
    is_direct = parts[0] is module or parts[0] in module._modules.values()
    return parts[0] if is_direct else None


def _swap(module: nn.Module) -> bool:
    """Swap one module if it has a known form, and return whether it has."""
    linear = _linear_inside(module)
    if linear is None or linear.weight.is_meta:
        return False
    if type(module).forward is nn.Linear.forward:
        _become_ghost(linear, residual=False)
        return True
    if module is linear:
        return False
    form = _probe(module, linear)
    if form is None:
        return False
    residual, in_tuple = form
    child = next(name for name, part in module._modules.items() if part is linear)
    _become_ghost(linear, residual)
    vars(module).update(_swapped_child=child, _swapped_in_tuple=in_tuple)
    module.__class__ = subclass_for("swapped", type(module))
    return True


def _probe(module: nn.Module, linear: nn.Linear) -> tuple[bool, bool] | None:
    """Return whether a module adds its input, and whether it returns a tuple; None if neither."""
    weight = linear.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, linear.in_features, generator=generator)
    x = x.to(device=weight.device, dtype=weight.dtype)
    try:
        with torch.no_grad(), evaluating(module):
            output, product = module.forward(x), linear.forward(x).float()
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return None  # A module that takes other arguments, or another shape, is no ghost.
    in_tuple = isinstance(output, tuple) and len(output) == 1
    y = output[0] if in_tuple else output
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    for residual in (True, False):
        expected = x.float() + product if residual else product
        error = (y.float() - expected).norm()
        if error <= _PROBE_TOLERANCES.get(weight.dtype, 1e-4) * expected.norm():
            return residual, in_tuple
    return None


def _become_ghost(linear: Any, residual: bool) -> None:
    """Turn a linear layer into a ghost that is the same object, with the same hooks."""
    fresh = vars(GhostLinear.from_linear(linear, residual))
    kept = {name: value for name, value in vars(linear).items() if "hook" in name}
    training = linear.training
    vars(linear).clear()
    vars(linear).update({**fresh, **kept, "training": training})
    linear.__class__ = GhostLinear


@maker("swapped")
def _swapped_class(base: Any) -> type:
    """Make the class of modules around a ghost that used to be a linear layer."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else next(iter(kwargs.values()))
        y = self.get_submodule(self._swapped_child)(hidden_states)
        return (y,) if self._swapped_in_tuple else y

    return type(
        base.__name__,
        bases_of(base),
        {"__module__": base.__module__, "__qualname__": base.__qualname__, "forward": forward},
    )
