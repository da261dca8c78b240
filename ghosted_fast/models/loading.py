"""Models from the hub, a folder or a GGUF file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ghosted_fast.errors import (
    ArgumentError,
    CheckpointError,
    GhostedFastError,
    SourceError,
)
from ghosted_fast.models.auto_classes import WITH_PICTURES, auto_classes
from ghosted_fast.models.built_whole import text_config_of
from ghosted_fast.models.checked.gguf_header import read_gguf_header, require_gguf
from ghosted_fast.models.checked.hub import hub_options, near_paths
from ghosted_fast.models.checked.pickle_reasons import said_of_pickle
from ghosted_fast.models.checked.usable import repair_generation
from ghosted_fast.models.families import GHOSTED_PREFIX
from ghosted_fast.text.files import first_line, is_readable_name
from ghosted_fast.text.loading import is_hub_id

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the torch dtype that a name means; `None` and "auto" mean the checkpoint's own.

    Raises:
        ArgumentError: The dtype is not one that the kernels take.
    """
    if dtype is None or dtype == "auto":
        return None
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise ArgumentError(
            f"expected dtype to be one of auto, {', '.join(_DTYPES)}, got {dtype!r}"
        )
    return found


def load_model(
    spec: str | Path,
    dtype: str | torch.dtype | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a language model and its tokenizer, in evaluation mode.

    A model that reads pictures or sound too is loaded whole.

    Args:
        spec: A hub id, a local folder, or the path of a GGUF file.
        dtype: Weights' dtype, by name ("bfloat16", "bf16", ...) or as torch has it; `None` or
            "auto" keeps the checkpoint's own.
        gguf_file: Name of the GGUF file inside `spec`, where `spec` is a folder or a hub id.
        trust_remote_code: Whether code that comes with the model may run. Without it, a model that
            needs such code is refused.

    Returns:
        The model (`transformers.PreTrainedModel`) and the tokenizer.

    Raises:
        SourceError: There is no such file, folder or hub model, it cannot be loaded, or weights of
            it are missing.
        CheckpointError: A ghosted folder or a GGUF file is damaged.
        MissingExtraError: A GGUF file was named and package gguf or accelerate is absent.
        ArgumentError: The dtype is unknown.
    """
    wanted = resolve_dtype(dtype)
    name, gguf_file = locate_model(str(spec), gguf_file)
    _refuse_lost_ghosts(name, gguf_file)
    options: dict[str, Any] = {}
    if gguf_file is not None:
        require_gguf()
        options = {"gguf_file": gguf_file}
        if (Path(name) / gguf_file).is_file():
            read_gguf_header(Path(name) / gguf_file)
    options |= source_options(name, trust_remote_code)
    tokenizer = load_tokenizer(name, spec, options)
    config = None if gguf_file is not None else read_config(name, trust_remote_code)
    with loading(spec):
        model, info = auto_class(config).from_pretrained(
            name,
            dtype=wanted or "auto",
            output_loading_info=True,
            **options,
            **_unpacked(gguf_file),
        )
    if missing := sorted(info["missing_keys"]):
        raise SourceError(
            f"expected all weights in {str(spec)!r}, got none for {', '.join(missing[:4])}"
            f"{', ...' * (len(missing) > 4)} ({len(missing)} missing): they would be random; copy "
            "or download the model again"
        )
    if gguf_file is not None and Path(name).is_dir():
        model.config._name_or_path = str(Path(name) / gguf_file)
    repair_generation(model)
    return model.eval(), tokenizer


@contextmanager
def loading(spec: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong while a model is loaded into the library's errors.

    Raises:
        SourceError: The model cannot be loaded; the message names it.
    """
    try:
        yield
    except GhostedFastError as error:
        if str(spec) in str(error) or not isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot load the model {str(spec)!r}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # transformers', safetensors', torch's, gguf's, and the system's
        said = f"expected a whole model, got {first_line(error)}"
        advice = "check that its files are whole, or copy or download it again"
        if "trust_remote_code" in str(error):
            said = "expected a class that transformers has, got one of code that comes with it"
            advice = "if you trust that code, pass --trust-remote-code (trust_remote_code=True)"
        elif isinstance(error, pickle.UnpicklingError):
            said = f"expected a .bin file of tensors alone, got {said_of_pickle(error)}"
            advice = "take a copy of the model in safetensors files, or download it again"
        elif not isinstance(error, OSError | ValueError):
            said += f" ({type(error).__name__})"
        raise SourceError(f"cannot load the model {str(spec)!r}: {said}; {advice}") from error


def _refuse_lost_ghosts(name: str, gguf_file: str | None) -> None:
    """Raise if a folder's configuration records ghosts, and names a class without any.

    Raises:
        CheckpointError: It does.
    """
    path = Path(name) / "config.json"
    if gguf_file is not None or not path.is_file():
        return
    try:
        values = json.loads(path.read_bytes())
        family, ghost = values.get("model_type"), values.get("ghost")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # the configuration's own reader says what is wrong with it
    if ghost is not None and not str(family).startswith(GHOSTED_PREFIX):
        raise CheckpointError(
            f"expected a model type that begins with {GHOSTED_PREFIX} in {str(path)!r}, which "
            f"records ghosts, got {family!r}: it was edited, save or copy the model again"
        )


def source_options(name: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return the options with which transformers loads what belongs to a model.

    Args:
        name: A hub id or a local folder.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        SourceError: It is a hub id, of which nothing is here, and the hub does not answer.
    """
    asked = {} if Path(name).is_dir() else hub_options(name)
    return {**asked, "trust_remote_code": trust_remote_code}


def read_config(name: str, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a model.

    Args:
        name: A hub id or a local folder.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        SourceError: It cannot be read.
    """
    from transformers import AutoConfig

    options = source_options(name, trust_remote_code)
    with loading(name):
        return AutoConfig.from_pretrained(name, **options)


def load_tokenizer(name: str, spec: str | Path, options: dict[str, Any]) -> Any:
    """Return a model's tokenizer.

    Args:
        name: A hub id or a local folder.
        spec: What the user calls it.
        options: See `source_options`; and `gguf_file`.

    Raises:
        SourceError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # tokenizers' own are plain ones
        if "trust_remote_code" in str(error):
            with loading(spec):
                raise
        raise SourceError(
            f"cannot load the model {str(spec)!r}: expected a tokenizer beside its weights, got "
            f"none that can be read ({first_line(error)}); copy the tokenizer's files of the model "
            "that it was made of into the folder"
        ) from error


def tokenizer_of(spec: str | Path) -> Any:
    """Return the tokenizer of a hub id, a local folder or a GGUF file.

    Raises:
        SourceError: There is no such model, or no tokenizer that can be read.
    """
    name, gguf_file = locate_model(str(spec), None)
    options = source_options(name) | ({} if gguf_file is None else {"gguf_file": gguf_file})
    return load_tokenizer(name, spec, options)


def load_processor(spec: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the processor of a model that reads pictures or sound too, None where it has none.

    It is saved in the place of the tokenizer, which it holds.

    Args:
        spec: A hub id or a local folder, as `load_model` takes it.
        trust_remote_code: Whether code that comes with the model may run.
    """
    name, gguf_file = locate_model(str(spec), None)
    if gguf_file is not None:
        return None
    from transformers import AutoProcessor, ProcessorMixin

    config = read_config(name, trust_remote_code)
    if text_config_of(config) is config:
        return None
    try:
        processor = AutoProcessor.from_pretrained(name, **source_options(name, trust_remote_code))
    except Exception:  # a folder without its files, or without the packages that they need
        return None
    return processor if isinstance(processor, ProcessorMixin) else None


def auto_class(config: Any) -> Any:
    """Return the auto class of a checkpoint: that for pictures and text where it reads both.

    Args:
        config: Its configuration, None for one of text alone.
    """
    from transformers import AutoModelForCausalLM

    if config is not None and text_config_of(config) is not config:
        found = {auto.__name__: auto for auto in auto_classes(type(config))}
        return next((found[n] for n in WITH_PICTURES if n in found), AutoModelForCausalLM)
    return AutoModelForCausalLM


def cast_parameters(model: Any, dtype: torch.dtype) -> Any:
    """Cast a model's parameters in place, as loading it in that dtype does.

    `model.to` would round the buffer of rotary frequencies as well, and the model would differ from
    the same one loaded from a checkpoint.

    Args:
        model: The model.
        dtype: What its parameters become.

    Returns:
        The model.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def locate_model(spec: str, gguf_file: str | None) -> tuple[str, str | None]:
    """Return what transformers calls the model, and its GGUF file if it is one.

    Raises:
        SourceError: There is no such file, folder or hub id.
    """
    path = Path(spec).expanduser()
    if not is_readable_name(spec):
        raise SourceError(
            f"expected a model's name in UTF-8, got {spec!r}, which tokenizers and safetensors "
            "cannot open: rename it"
        )
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SourceError(
                f"expected a hub id, a folder or a .gguf file, got a file of another kind: {spec!r}"
            )
        return str(path.parent), path.name
    if path.is_dir():
        if gguf_file is not None or (path / "config.json").is_file():
            return str(path), gguf_file
        candidates = sorted(file.name for file in path.glob("*.gguf"))
        if len(candidates) == 1:
            return str(path), candidates[0]
        held = (
            f"several GGUF files ({', '.join(candidates)}): name one"
            if candidates
            else ("neither config.json nor a .gguf file")
        )
        raise SourceError(
            f"the folder {spec!r} holds {held}: expected config.json or one .gguf file, got "
            f"{len(candidates)} of these; give the folder or file of a model"
        )
    if not is_hub_id(spec, (".gguf",)):
        raise SourceError(
            f"there is no folder or file {spec!r}{near_paths(path)}; expected an existing path, or "
            "a hub id such as 'HuggingFaceTB/SmolLM2-135M-Instruct': check the name"
        )
    return spec, gguf_file


def _unpacked(gguf_file: str | None) -> dict[str, Any]:
    """Return the options that make plain weights of a GGUF file's blocks.

    Newer versions of transformers keep the blocks packed where they have a kernel for them.
    """
    import transformers

    if gguf_file is None or not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}
