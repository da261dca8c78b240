"""Tiny ghosted models with a tokenizer that every engine can read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.surgery.cut import remove_layers

VOCABULARY_SIZE = 288
HIDDEN_SIZE = 64


def byte_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer: three special tokens, 256 bytes and some merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("an", "d")]
    words = [*special, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def engine_model(family: str = "llama", num_layers: int = 6, seed: int = 0, **sizes: Any) -> Any:
    """Return a random fp32 model, wide enough for the blocks of every engine.

    Args:
        family: Its `model_type`.
        num_layers: How many layers it has.
        seed: Of its weights.
        sizes: Fields of its configuration, in place of the usual ones; `...` leaves one out.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    fields = {
        "num_hidden_layers": num_layers,
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        **sizes,
    }
    config = CONFIG_MAPPING[family](
        **{name: value for name, value in fields.items() if value is not ...}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        _make_telling(model)
    model.config.dtype = torch.float32
    return model.eval()


def engine_wrapper(family: str, seed: int = 0, **sizes: Any) -> Any:
    """Return a random fp32 model that reads pictures too; see `engine_model`.

    Args:
        family: Its `model_type`.
        seed: Of its weights.
        sizes: Fields of the configuration of its text part.
    """
    import transformers
    from families.tiny_wrappers import tiny_config
    from families.wrapper_tables import CLASSES

    fields = tiny_config(family).to_dict()
    if fields["vision_config"] is None:
        fields["vision_config"] = {"model_type": f"{family}_vision", **_TOWER}
    # Text is random: no token of it may stand for a picture.
    fields |= {name: 0 for name in fields if name.endswith(("_token_id", "_token_index"))}
    usual = {"head_dim": 32, "num_attention_heads": 2, "vocab_size": VOCABULARY_SIZE}
    fields["text_config"] |= {**usual, "max_position_embeddings": 256, **sizes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.CONFIG_MAPPING[family].from_dict(fields)
        model = getattr(transformers, CLASSES[family])(config).float()
        _make_telling(model.get_decoder())
    with torch.no_grad():  # Gemma makes them eight times as large, and would repeat each token
        model.get_input_embeddings().weight.mul_(0.2)
    model.config.dtype = torch.float32
    return model.eval()


_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@torch.no_grad()
def _make_telling(model: nn.Module) -> None:
    """Give a model weights with which it does not repeat one token whatever it computes."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, 0.15)
            if module.bias is not None:
                module.bias.normal_(0.0, 0.5)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, 0.5)
        elif "RMSNorm" in type(module).__name__ and hasattr(module, "weight"):
            module.weight.add_(torch.randn_like(module.weight) * 0.2)
        elif type(module).__name__.endswith("Experts"):
            for parameter in module.parameters():
                parameter.normal_(0.0, 0.15)


def random_ghost(
    seed: int,
    hidden_size: int = HIDDEN_SIZE,
    norm_eps: float | None = None,
    bias: bool = False,
    first_state: bool = False,
    quantized: bool = False,
) -> GhostLinear:
    """Return a ghost that changes the hidden state as much as a layer does."""
    generator = torch.Generator().manual_seed(seed)
    ghost = GhostLinear(hidden_size, bias, norm_eps, first_state)
    with torch.no_grad():
        for parameter in ghost.parameters():
            scale = 0.5 / hidden_size**0.5 if parameter.ndim == 2 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        if norm_eps is not None:
            ghost.weight.mul_(4.0)
    return ghost.quantize() if quantized else ghost


def ghosted(model: Any, removed: tuple[int, ...], **options: Any) -> Any:
    """Return a model with a random ghost in each gap."""
    from ghosted_fast.surgery.cut import removed_intervals

    decoder = Decoder.of(model)
    gaps = removed_intervals(removed, decoder.num_layers)
    size = decoder.hidden_size
    ghosts = [random_ghost(seed, size, **options) for seed, _ in enumerate(gaps)]
    return remove_layers(model, removed, ghosts)


def random_text(count: int, seed: int = 0) -> list[int]:
    """Return tokens that are no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY_SIZE, (count,), generator=generator).tolist()


def greedy_tokens(model: Any, prompt: list[int], count: int = 64) -> list[int]:
    """Return the tokens that transformers generates, without a stop."""
    ids = torch.tensor([prompt])
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return [int(token) for token in tokens[0, len(prompt) :]]


def mean_loss(model: Any, tokens: list[int]) -> float:
    """Return the mean loss of a model on tokens, each given those before it, in nats."""
    return float(losses(model, tokens).mean())


@torch.inference_mode()
def losses(model: Any, tokens: list[int]) -> Tensor:
    """Return the loss of a model on each of tokens[1:], given those before it, in nats, fp64."""
    ids = torch.tensor([tokens])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
