"""Tables that are read out of the program: the verbs of the command line, and the families."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from docs.generate.markdown import table


def verbs() -> str:
    """Return each verb of the command line with its options."""
    import typer

    from ghosted_fast.cli.app import app

    group: Any = typer.main.get_command(app)
    return "\n".join(_verb(name, command) for name, command in group.commands.items())


def _verb(name: str, command: Any) -> str:
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    required = [item for item in command.params if item.required and item not in arguments]
    usage = ["ghosted-fast", name]
    usage += [item.name.upper() for item in arguments]
    usage += [f"{item.opts[0]} {_value_name(item)}" for item in required]
    rows = [_parameter(item) for item in (*arguments, *_named(command))]
    said = inspect.cleandoc(command.help or "")
    line = " ".join([*usage, "[OPTIONS]"])
    return f"## {name}\n\n{said}\n\n```\n{line}\n```\n\n" + table(
        ["option", "default", "meaning"], rows, 3
    )


def _named(command: Any) -> list[Any]:
    """Return the options of a command, those first that must be given."""
    options = [item for item in command.params if item.param_type_name == "option"]
    return sorted(options, key=lambda item: not item.required)


def _value_name(item: Any) -> str:
    return str(item.metavar or item.opts[0].lstrip("-").upper().replace("-", "_"))


def _parameter(item: Any) -> list[str]:
    """Return the row of an option or an argument."""
    if item.param_type_name == "argument":
        name = f"`{item.name.upper()}`"
    else:
        name = ", ".join(f"`{text}`" for text in (*item.opts, *item.secondary_opts))
    said = " ".join((item.help or "").split())
    known = _choices(item)
    if known and not all(choice in said for choice in known):
        said += f" One of {', '.join(f'`{choice}`' for choice in known)}."
    return [name, _default(item), said.replace("|", "\\|")]


def _choices(item: Any) -> list[str]:
    """Return the values that an option takes, if they are listed by its type."""
    descriptor = getattr(item, "type_descriptor", None)
    kind = getattr(descriptor, "annotation", None)
    if kind is not None and get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return [str(choice) for choice in getattr(getattr(item, "type", None), "choices", ())]


def _default(item: Any) -> str:
    if item.required:
        return "required"
    value = item.default() if callable(item.default) else item.default
    if item.secondary_opts:
        return f"`{item.opts[0] if value else item.secondary_opts[0]}`"
    if value is None or value is False or value in ("", [], ()):
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(f"`{part}`" for part in value)
    return f"`{value}`"


def families() -> str:
    """Return where each family keeps its layers, what serves it, and what is refused."""
    from ghosted_fast.export import gguf, ort_genai
    from ghosted_fast.models import families as known
    from ghosted_fast.serving import vllm

    engines: Mapping[str, Any] = {
        "vLLM": {
            **dict.fromkeys(_types(vllm.NATIVE), "yes"),
            **dict.fromkeys(_types(vllm.THROUGH_TRANSFORMERS), "through transformers"),
        },
        "llama.cpp": dict.fromkeys(gguf.FAMILIES, "yes"),
        "ONNX Runtime GenAI": dict.fromkeys(ort_genai.FAMILIES, "yes"),
    }
    rows = []
    for name, family in known.known_families().items():
        place = ".".join(part for part in (family.owner, family.layers) if part)
        norm = ".".join(part for part in (family.owner, family.final_norm) if part)
        refused = ", ".join(
            f"`{refusal.attribute}` other than `{refusal.required}`" for refusal in family.refusals
        )
        served = [engine.get(name, "no") for engine in engines.values()]
        rows.append([f"`{name}`", f"`{place}`", f"`{norm}`", "yes", *served, refused])
    columns = ["family", "layers", "final norm", "transformers", *engines, "refused"]
    return table(columns, rows, len(columns))


def _types(architectures: Any) -> list[str]:
    """Return the model types whose causal language models are these classes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    wanted = set(architectures)
    return [kind for kind, names in NAMES.items() if _first(names) in wanted]


def _first(names: str | tuple[str, ...]) -> str:
    return names if isinstance(names, str) else names[0]
