"""A ghosted model as a folder that ONNX Runtime GenAI runs.

The graph is made by the engine's own builder. Its class for the model's family is given a step
after each layer with a ghost: the two summands of the layer's output, which the next fused
add-and-norm takes, become the hidden state and what the ghost adds to it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from ghosted_fast._atomic_files import atomic_folder
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.errors import ArgumentError, MissingExtraError, UnsupportedModelError
from ghosted_fast.models.families import dense_model_type
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.ghosted_layers import INPUT, OUTPUT, ghost_of
from ghosted_fast.models.runtime_classes import named_base_of

Precision = Literal["fp32", "int8", "int4"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
# The builder is no public interface: another version may call its steps otherwise.
TESTED = "0.18"
_PACKAGES = ("onnxruntime_genai", "onnxruntime", "onnx_ir")
# One scale for each 16 numbers, of weights and of the activations that meet them: in the builder's
# blocks of 32, twice as many take the precision of a token's massive channel (SmolLM2's perplexity
# +0.41% in place of +0.24%). Activations in fp32 would cost the speed: 6 tokens/s, not 103.
_OPTIONS = {"int8": ["block_size=16"]}
_INSTALL = f"pip install 'onnxruntime-genai=={TESTED}.*' onnxruntime onnx-ir"


def export_ort_genai(
    model: Any,
    folder: str | os.PathLike[str],
    tokenizer: Any,
    precision: Precision = "fp32",
    overwrite: bool = False,
) -> Path:
    """Write a model, ghosted or not, as a folder for ONNX Runtime GenAI on the processor.

    Args:
        model: A causal language model of one of `FAMILIES`, with ghosts of any form.
        folder: The folder to make. Its parents are made as needed.
        tokenizer: Its transformers tokenizer.
        precision: "fp32", or how matrices are stored: "int8" or "int4", ghosts included.
        overwrite: Whether an existing folder is replaced, once the new one is complete.

    Returns:
        The folder.

    Raises:
        MissingExtraError: The engine is absent, or of another version than the builder's steps
            are known of.
        ArgumentError: The folder is there, or the precision is unknown.
        UnsupportedModelError: The family is not among those that were tried.
    """
    target = Path(folder)
    if target.exists() and not (overwrite and target.is_dir()):
        raise ArgumentError(f"{str(target)!r} exists: name another folder, or overwrite")
    if precision not in ("fp32", "int8", "int4"):
        raise ArgumentError(f"expected precision to be fp32, int8 or int4, got {precision!r}")
    family = dense_model_type(model.config)
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"expected a model of the families {', '.join(FAMILIES)}, whose graphs ONNX Runtime "
            f"GenAI is known to build with ghosts, got {family!r}. Serve it with transformers or "
            "vLLM."
        )
    check_engine()
    with atomic_folder(target) as workspace:
        source = save_model(model, workspace / "source", tokenizer)
        _build(model, source, workspace / "new", precision, workspace / "cache")
    return target


def check_engine() -> None:
    """Raise unless the engine is installed, in the version that was tested.

    Raises:
        MissingExtraError: It is not; the message holds the command that installs it.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"an export for ONNX Runtime GenAI needs {', '.join(missing)}: {_INSTALL}"
        )
    found = version("onnxruntime-genai")
    if not found.startswith(f"{TESTED}."):
        raise MissingExtraError(
            f"expected onnxruntime-genai {TESTED}.*, whose builder is extended here, got {found}: "
            f"{_INSTALL}"
        )


def _build(model: Any, source: Path, folder: Path, precision: str, cache: Path) -> None:
    """Run the engine's builder on a saved model."""
    from onnxruntime_genai.models import builder

    with contextlib.redirect_stdout(None):
        options = builder.parse_extra_options(
            "", str(source), str(folder), precision, "cpu", str(cache), _OPTIONS.get(precision, [])
        )
        # It chooses its class by the architecture's name: that of the dense model.
        dense: Any = named_base_of(type(model))
        options["hf_details"]["hf_config"].architectures = [dense.__name__]
        with _ghosted_builders(builder, model):
            builder.create_model("", str(source), str(folder), precision, "cpu", str(cache),
                                 **options)  # fmt: skip


@contextlib.contextmanager
def _ghosted_builders(builder: Any, model: Any) -> Iterator[None]:
    """Give the builder's classes their step for ghosts, and the model that is in memory."""
    plain = {
        name: value
        for name, value in vars(builder).items()
        if isinstance(value, type) and issubclass(value, builder.Model)
    }
    try:
        for name, value in plain.items():
            setattr(builder, name, _ghosted_builder(value, model))
        yield
    finally:
        for name, value in plain.items():
            setattr(builder, name, value)


def _ghosted_builder(base: Any, model: Any) -> type:
    """Return a builder class that makes the nodes of ghosts as well."""

    class GhostedBuilder(base):
        def load_weights(self, input_path: str) -> Any:
            return model

        def make_layer(self, layer_id: int, layer: Any) -> None:
            before, after = ghost_of(layer, INPUT), ghost_of(layer, OUTPUT)
            if before is not None:
                _add_ghost(self, f"/model/layers.{layer_id}/input_ghost", before)
            super().make_layer(layer_id, layer)
            if after is not None:
                _add_ghost(self, f"/model/layers.{layer_id}/ghost", after)

    return GhostedBuilder


def _add_ghost(builder: Any, name: str, ghost: GhostLinear) -> None:
    """Add a ghost's nodes, and let the next norm take the hidden state and what is added to it."""
    stream, dtype, shape = (
        builder.layernorm_attrs,
        builder.io_dtype,
        builder.make_hidden_state_shape(),
    )
    dotted = name[1:].replace("/", ".")
    x = stream["root_input"]
    if stream["first_layernorm"] is False:
        builder.make_add(f"{name}/Stream", [x, stream["skip_input"]], dtype, shape)
        x = f"{name}/Stream/output_0"
    features = x
    if ghost.norm_eps is not None:
        builder.make_initializer(torch.ones(ghost.hidden_size), f"{dotted}.ones", to=dtype)
        features = f"{name}/Norm/output_0"
        builder.make_node(
            "SimplifiedLayerNormalization",
            inputs=[x, f"{dotted}.ones"],
            outputs=[features],
            name=f"{name}/Norm",
            epsilon=ghost.norm_eps,
            axis=-1,
            stash_type=1,
        )
        builder.make_value(features, dtype, shape=shape)
    weight = ghost.weight if ghost.scale is None else ghost.weight * ghost.scale[:, None]
    added = builder.make_matmul(SimpleNamespace(weight=weight), f"{name}/MatMul", features)
    delta = f"{added}/output_0"
    if ghost.bias is not None:
        builder.make_initializer(ghost.bias, f"{dotted}.bias", to=dtype)
        builder.make_add(f"{name}/Bias", [delta, f"{dotted}.bias"], dtype, shape)
        delta = f"{name}/Bias/output_0"
    if ghost.first_state is not None:
        first = _first_tokens(builder)
        for side, value, chosen in (
            ("State", x, ghost.first_state),
            ("Delta", delta, torch.zeros(ghost.hidden_size)),
        ):
            builder.make_initializer(chosen, f"{dotted}.first.{side}", to=dtype)
            inputs = [first, f"{dotted}.first.{side}", value]
            builder.make_where(f"{name}/First{side}", inputs, dtype, shape)
        x, delta = f"{name}/FirstState/output_0", f"{name}/FirstDelta/output_0"
    if stream["first_layernorm"]:
        # The first norm is not fused with an addition.
        builder.make_add(f"{name}/Sum", [x, delta], dtype, shape)
        x = delta = f"{name}/Sum/output_0"
    stream["root_input"], stream["skip_input"] = x, delta


def _first_tokens(builder: Any) -> str:
    """Add the nodes that mark the first attended token of each sequence, once.

    Returns:
        The name of a value, bool [batch, sequence, 1].
    """
    name, int64 = "/model/ghost_first", "/model/constants/INT64"
    mask, ids = builder.input_names["attention_mask"], builder.input_names["input_ids"]
    seen = ["batch_size", "total_sequence_length"]
    now = ["batch_size", "sequence_length"]
    from onnx_ir import DataType

    builder.make_node("CumSum", [mask, f"{int64}/1"], [f"{name}/Count"], name=f"{name}/CumSum")
    builder.make_value(f"{name}/Count", DataType.INT64, shape=seen)
    builder.make_equal(f"{name}/Equal", [f"{name}/Count", f"{int64}/1"], seen)
    builder.make_shape(f"{name}/Shape", ids, [2])
    builder.make_slice(
        f"{name}/Length",
        [f"{name}/Shape/output_0", f"{int64}/[1]", f"{int64}/[2]", f"{int64}/[0]"],
        DataType.INT64,
        [1],
    )
    builder.make_node(
        "Neg", [f"{name}/Length/output_0"], [f"{name}/Start"], name=f"{name}/Neg"
    )  # fmt: skip
    builder.make_value(f"{name}/Start", DataType.INT64, shape=[1])
    end = f"{int64}/[{torch.iinfo(torch.int64).max}]"
    builder.make_slice(
        f"{name}/Now",
        [f"{name}/Equal/output_0", f"{name}/Start", end, f"{int64}/[1]"],
        DataType.BOOL,
        now,
    )
    builder.make_unsqueeze(
        f"{name}/Unsqueeze", [f"{name}/Now/output_0", f"{int64}/[2]"], DataType.BOOL, [*now, 1]
    )
    return f"{name}/Unsqueeze/output_0"
