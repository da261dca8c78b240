"""A source of layers: where a sweep gets one layer at a time from, and what it is called with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.models.boundaries import resume
from ghosted_fast.models.contract import as_returned, hidden_state, plain_tokens, state_in
from ghosted_fast.models.decoder import Decoder, evaluating
from ghosted_fast.models.families import GHOSTED_PREFIX
from ghosted_fast.models.unloaded.opening import (
    Unloaded,
    buffers_on,
    layer_in,
    load_into,
    replace_tensors,
    tensors_on_meta,
)
from ghosted_fast.models.unloaded.stand_in import stand_ins
from ghosted_fast.models.unloaded.transfers import LayerBuffers, Slot, Streams, room_for
from ghosted_fast.text.batches import Batch


@dataclass(frozen=True, eq=False)
class Call:
    """What one layer is given for one batch beside the hidden state.

    Attributes:
        args: Arguments behind the first.
        kwargs: Arguments by name.
        by_name: Whether the hidden state is given by name too.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Return what a layer makes of a hidden state [batch, length, d]."""
        if self.by_name:
            return state_in(layer(*self.args, **{**self.kwargs, "hidden_states": hidden}))
        return state_in(layer(hidden, *self.args, **self.kwargs))


# What each layer is called with for one batch; None for a layer that does not run on text.
Calls = Sequence[Call | None]
# The tensors of a layer by their names in the files, and the buffer of a device that they lie in.
_Read = tuple[dict[str, Tensor], Slot | None]


class LayerSource(ABC):
    """Hands out the layers of a model one at a time.

    Args:
        decoder: The model, whose layers may have no memory until they are handed out.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    @abstractmethod
    def embedding(self) -> Any:
        """Return a context in which `embed` works."""

    @abstractmethod
    def layer(self, index: int, then: int | None = None) -> Any:
        """Return a context that yields a layer, ready to run.

        Args:
            index: The layer.
            then: The one that will be asked for next, which may be read meanwhile.
        """

    @abstractmethod
    def head(self) -> Any:
        """Return a context in which `logits` works."""

    def embed(self, batch: Batch) -> tuple[Tensor, Calls]:
        """Return the states that enter the first layer, and what each layer is called with.

        They are taken from the model's own forward pass, with recorders in place of the layers.

        Args:
            batch: The tokens.

        Raises:
            UnsupportedModelError: The model does something to the state between two layers.
        """
        return _recorded(self.decoder, batch)

    def logits(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Return the logits [batch, length, vocabulary] of states behind the last layer."""
        return resume(self.decoder, batch, self.decoder.num_layers, hidden)


class LoadedSource(LayerSource):
    """The source whose layers are in memory all the time."""

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Do nothing: all is there."""
        yield

    @contextmanager
    def layer(self, index: int, then: int | None = None) -> Iterator[nn.Module]:
        """Yield the model's own layer."""
        yield self.decoder.layers[index]

    head = embedding


class FolderSource(LayerSource):
    """The source that reads each layer from the files of a checkpoint, and forgets it.

    Args:
        unloaded: The model.
        prefetch: Whether a thread reads the next layer while one computes, which takes the memory
            of a second layer.
        streams: Those of the device that computes; None for the processor. There each layer is read
            into page-locked memory, and copied into one of two buffers while another computes.

    Raises:
        UnsupportedModelError: See `check_sweepable`, or a weight beside the layers is missing.
    """

    def __init__(
        self, unloaded: Unloaded, prefetch: bool = True, streams: Streams | None = None
    ) -> None:
        decoder = Decoder.of(unloaded.model)
        super().__init__(decoder if streams is None else replace(decoder, device=streams.device))
        with stand_ins(unloaded.model):
            check_sweepable(self.decoder)
        self._check_own_weights(unloaded)
        if unloaded.missing:
            raise UnsupportedModelError(
                f"expected all weights in the files of {unloaded.spec!r}, which lack "
                f"{', '.join(sorted(unloaded.missing)[:4])}: load the model and save it once"
            )
        self.unloaded = unloaded
        self._meta = tensors_on_meta(unloaded.model)
        self._threads = ThreadPoolExecutor(1) if prefetch else None
        self._coming: tuple[int, Future[_Read]] | None = None
        self._buffers: LayerBuffers | None = None
        if streams is not None:
            self._buffers = LayerBuffers(streams, layer_room(unloaded), 2 if prefetch else 1)

    def _check_own_weights(self, unloaded: Unloaded) -> None:
        names = [name for pair in unloaded.ties.items() for name in pair]
        shared = [name for name in names if layer_in(name, unloaded.layers_path) is not None]
        if shared:
            raise _not_one_by_one(self.decoder, f"they share weights, such as {shared[0]}")

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Hold what stands beside the layers, but the head."""
        head = self.decoder.model.get_output_embeddings()
        with self._beside(without=head):
            yield

    @contextmanager
    def head(self) -> Iterator[None]:
        """Hold what stands beside the layers; the embedding gives zeros unless the head is it."""
        embedding = self.decoder.model.get_input_embeddings()
        with self._beside(without=embedding):
            if embedding.weight.is_meta:  # nobody looks at what it gives
                one = torch.zeros(1, dtype=embedding.weight.dtype, device=self.decoder.device)
                none = one.expand(embedding.weight.shape)
                replace_tensors(embedding, {(embedding, "weight"): nn.Parameter(none, False)})
            yield

    @contextmanager
    def layer(self, index: int, then: int | None = None) -> Iterator[nn.Module]:
        """Yield a layer with its weights, which are gone afterwards."""
        layer = self.decoder.layers[index]
        tensors, slot = self._take(index)
        if then is not None and self._threads is not None:
            self._coming = then, self._threads.submit(self._read_layer, then)
        with self._using(slot), buffers_on(layer, self.decoder.device):
            try:
                load_into(self.unloaded.model, self.unloaded.settings, tensors)
                del tensors
                yield layer
            finally:
                replace_tensors(layer, self._meta)

    def _take(self, index: int) -> _Read:
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == index:
            return coming[1].result()
        if coming is not None and self._buffers is not None:
            wait([coming[1]])  # buffers are filled one after the other
        return self._read_layer(index)

    def _read_layer(self, index: int) -> _Read:
        names = self.unloaded.by_layer.get(index, ())
        if self._buffers is None:
            return self._read(names), None
        return self._buffers.load({name: self.unloaded.tensors[name] for name in names})

    def _using(self, slot: Slot | None) -> AbstractContextManager[None]:
        if slot is None or self._buffers is None:
            return nullcontext()
        return self._buffers.using(slot)

    def _read(self, names: Collection[str]) -> dict[str, Tensor]:
        places, device = {name: self.unloaded.tensors[name] for name in names}, self.decoder.device
        read = {place: place.read().to(device) for place in dict.fromkeys(places.values())}
        return {name: read[place] for name, place in places.items()}  # some share one

    @contextmanager
    def _beside(self, without: nn.Module | None) -> Iterator[None]:
        """Hold what stands beside the layers, but one module's weight and other towers."""
        model, names = self.decoder.model, self.unloaded.names
        towers = tuple(f"{path}." for path in self._other_towers())
        left = ""
        if without is not None:
            path = next(n for n, module in model.named_modules() if module is without)
            tied = {name for pair in self.unloaded.ties.items() for name in pair}
            left = "" if f"{path}.weight" in tied else f"{path}.weight"
        wanted = [
            name
            for name in self.unloaded.by_layer.get(None, [])
            if names[name] != left and not names[name].startswith(towers)
        ]
        with buffers_on(model, self.decoder.device):
            try:
                load_into(model, self.unloaded.settings, self._read(wanted))
                _tie(self.unloaded)
                yield
            finally:
                replace_tensors(model, self._meta)

    def _other_towers(self) -> list[str]:
        """Return the paths of models inside the model that are not the text decoder's."""
        from transformers import PreTrainedModel

        owner = self.decoder.owner
        return [
            path
            for path, module in self.decoder.model.named_modules()
            if isinstance(module, PreTrainedModel) and owner not in set(module.modules())
            if module not in set(owner.modules())
        ]


def layer_room(unloaded: Unloaded) -> int:
    """Return the bytes of a buffer on a device for any layer of a model, as it is read."""
    layers = (names for layer, names in unloaded.by_layer.items() if layer is not None)
    return max(room_for(unloaded.tensors[name] for name in names) for names in layers)


def check_sweepable(decoder: Decoder) -> None:
    """Raise unless the layers of a model can be run one after the other, each on one state alone.

    Args:
        decoder: The model, able to run.

    Raises:
        UnsupportedModelError: It is ghosted, its layers use more of earlier ones than the hidden
            state, or called one by one they give something else; or see `Decoder.contract`.
    """
    if str(decoder.model.config.model_type).startswith(GHOSTED_PREFIX):
        raise UnsupportedModelError(
            "expected a dense model to sweep through, got one with ghosts: load it (load_model)"
        )
    if decoder.uses_layers_below:
        raise _not_one_by_one(
            decoder, "they use more of earlier ones than the hidden state that is handed on"
        )
    _check_run_one_by_one(decoder)


def _check_run_one_by_one(decoder: Decoder) -> None:
    """Raise unless layers that are called one by one give what the model's own pass does."""
    tokens = plain_tokens(decoder.model)
    batch = Batch(tokens, torch.ones_like(tokens))
    with evaluating(decoder.model), torch.inference_mode():
        expected = decoder.model(tokens, use_cache=False)[0]
        try:
            hidden, calls = _recorded(decoder, batch)
            for layer, call in zip(decoder.layers, calls, strict=True):
                hidden = hidden if call is None else call.run(layer, hidden)
            got = resume(decoder, batch, decoder.num_layers, hidden)
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever the family's own code asks for
            raise _not_one_by_one(decoder, f"{type(error).__name__}: {error}") from error
    if not torch.allclose(got.float(), expected.float(), rtol=1e-2, atol=1e-3):
        far = (got - expected).abs().max().item()
        raise _not_one_by_one(decoder, f"the logits differ by {far:.2g}")


def _not_one_by_one(decoder: Decoder, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the layers of this {decoder.family.name} model cannot be run one by one ({reason}): load "
        "the model (load_model, or more memory)"
    )


def _tie(unloaded: Unloaded) -> None:
    """Give weights that are one weight the memory of the one that has some."""
    model = unloaded.model
    for pair in unloaded.ties.items():
        held = [model.get_parameter(name) for name in pair]
        real = next((weight for weight in held if not weight.is_meta), None)
        for name in pair if real is not None else ():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = real


class _AllRecorded(Exception):
    """Ends a forward pass behind the last recorder."""


class _Recorder(nn.Module):
    """Stands in for a layer, keeps what it is called with, and answers for its attributes."""

    def __init__(self, decoder: Decoder, index: int, tape: _Tape) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", decoder.layers[index])
        object.__setattr__(self, "_tape", tape)
        self._index, self._returns = index, decoder.contract.returns[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the arguments, and hand on the state as it is."""
        hidden = hidden_state(args, kwargs)
        self._tape.keep(self._index, hidden, args, kwargs)
        return as_returned(hidden, self._returns, kwargs)


class _Tape:
    """What the recorders of one pass have heard."""

    def __init__(self, decoder: Decoder, last: int) -> None:
        self.decoder, self.last = decoder, last
        self.hidden: Tensor | None = None
        self.calls: list[Call | None] = [None] * decoder.num_layers

    def keep(
        self, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Keep what a layer is called with."""
        if self.hidden is None:
            self.hidden = hidden
        elif hidden is not self.hidden:
            raise _not_one_by_one(
                self.decoder, f"the hidden state is changed before layer {index}, outside of them"
            )
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self.calls[index] = Call(args[1:], others, not args)
        if index == self.last:
            raise _AllRecorded


def _recorded(decoder: Decoder, batch: Batch) -> tuple[Tensor, Calls]:
    """Return the states that enter the first layer, and what each layer is called with."""
    layers, resting = decoder.layers, decoder.contract.resting
    running = [index for index in range(len(layers)) if index not in resting]
    tape = _Tape(decoder, running[-1])
    originals = {index: layers[index] for index in running}
    recorders = {index: _Recorder(decoder, index, tape) for index in running}
    base = getattr(decoder.model, "base_model", decoder.model)
    try:
        for index in running:
            layers[index] = recorders[index]
        with torch.no_grad():  # what layers are called with autograd may look at later
            base(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    except _AllRecorded:
        pass
    finally:
        for index, layer in originals.items():
            layers[index] = layer
    assert tape.hidden is not None
    return tape.hidden, tape.calls
