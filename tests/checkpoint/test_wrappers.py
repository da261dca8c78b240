"""Models that read pictures too are cut inside their text decoder and saved whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_wrappers import tiny_wrapper
from safetensors.torch import save_file
from support.tiny_text import TEXT, save_tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaProcessor,
)
from typer.testing import CliRunner

from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.cli.app import app
from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.loading import load_model, load_processor
from ghosted_fast.options import RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import random_tokens

NAMES = ["gemma3", "llava", "qwen2_5_vl", "qwen3_vl", "mistral3", "smolvlm"]


@torch.inference_mode()
def logits(model: Any, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, attention_mask=mask, **inputs).logits
    return found


def ghost(width: int) -> GhostLinear:
    made = GhostLinear(width, bias=True, first_state=True)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.1)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapper_comes_back_whole(name: str, tmp_path: Path) -> None:
    model = tiny_wrapper(name)
    decoder = Decoder.of(model)
    smaller = remove_layers(model, [1, 2], [ghost(decoder.hidden_size)])
    ids = random_tokens(2, 8, 5) % 30 + 5
    save_model(smaller, tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(again, ids), logits(smaller, ids))
    assert again.config.get_text_config().num_hidden_layers == decoder.num_layers - 2
    towers = {k: v for k, v in model.state_dict().items() if "vis" in k}
    assert towers
    found = again.state_dict()
    assert all(torch.equal(found[key], value) for key, value in towers.items())


@pytest.mark.parametrize("name", NAMES)
def test_first_tokens_are_found_behind_padding(name: str) -> None:
    model = tiny_wrapper(name)
    smaller = remove_layers(model, [1, 2], [ghost(Decoder.of(model).hidden_size)])
    ids = random_tokens(1, 6, 7) % 30 + 5
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    got = logits(smaller, padded, mask)[:, -1]
    greedy: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.allclose(got, logits(smaller, ids, torch.ones_like(ids))[:, -1], atol=2e-3)
    alone = smaller.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    behind = smaller.generate(padded, attention_mask=mask, **greedy)
    assert torch.equal(alone[:, 6:], behind[:, 9:])


def test_pictures_reach_the_cut_decoder(tmp_path: Path) -> None:
    model = tiny_wrapper("llava")
    smaller = remove_layers(model, [1, 2], [ghost(Decoder.of(model).hidden_size)])
    save_model(smaller, tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    size = model.config.vision_config.image_size
    patches = (size // model.config.vision_config.patch_size) ** 2
    ids = torch.tensor([[7, *[model.config.image_token_id] * patches, 9, 11]])
    picture = torch.randn(1, 3, size, size)
    with_picture = logits(smaller, ids, torch.ones_like(ids), pixel_values=picture)
    assert torch.equal(logits(again, ids, torch.ones_like(ids), pixel_values=picture), with_picture)
    other = logits(smaller, ids, torch.ones_like(ids), pixel_values=picture + 1)
    assert not torch.allclose(other, with_picture, atol=1e-4)


def test_the_whole_way_through() -> None:
    model = tiny_wrapper("gemma3")
    texts = [random_tokens(4, 32, seed) % 30 + 5 for seed in range(16)]
    smaller, report = ghost_model(
        model, texts, remove=2, run=RunOptions(corrections=1, progress=False)
    )
    assert report.family == "gemma3_text" and len(report.removed) == 2
    assert type(smaller).__name__ == "GhostedGemma3ForConditionalGeneration"
    with pytest.raises(ArgumentError, match=r"text alone, got \['pixel_values'\]"):
        ghost_model(model, [{"input_ids": texts[0], "pixel_values": texts[0]}], removed=[1])


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """Return a model folder with a processor."""
    folder = tmp_path / "llava"
    tiny_wrapper("llava").save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    picture_token = tokenizer.convert_ids_to_tokens(5)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(), tokenizer, patch_size=8, image_token=picture_token
    )
    processor.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    processor.save_pretrained(folder)
    return folder


def check_whole(smaller: Path, folder: Path) -> None:
    """Check that a folder holds the cut model and the processor of the one it comes from."""
    again, _ = load_model(smaller)
    assert type(again).__name__ == "GhostedLlavaForConditionalGeneration"
    kept, given = AutoProcessor.from_pretrained(smaller), load_processor(folder)
    assert type(kept) is LlavaProcessor and kept.chat_template == given.chat_template
    assert kept.image_processor.to_dict() == given.image_processor.to_dict()


def test_fit_takes_a_folder_with_a_processor(llava: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join([TEXT] * 60))
    given = f"fit --model {llava} --calibration {text} --tokens 1024 --sequence-length 32"
    given += f" --removed 2-3 --corrections 0 --output {tmp_path / 'smaller'}"
    result = CliRunner().invoke(app, given.split())
    assert result.exit_code == 0, result.output
    check_whole(tmp_path / "smaller", llava)
    with pytest.raises(ValueError, match="Unrecognized configuration"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")


def test_import_keeps_the_processor(llava: Path, tmp_path: Path) -> None:
    width = Decoder.of(load_model(llava)[0]).hidden_size
    save_file({"gap.weight": torch.randn(width, width) / 20}, tmp_path / "operators.safetensors")
    given = f"import {tmp_path / 'operators.safetensors'} --model {llava} --removed 2-3"
    given += f" --form delta --layout out-in --output {tmp_path / 'smaller'}"
    result = CliRunner().invoke(app, given.split())
    assert result.exit_code == 0, result.output
    check_whole(tmp_path / "smaller", llava)


def test_models_of_text_have_no_processor(tmp_path: Path) -> None:
    assert load_processor(save_tiny_model(tmp_path / "tiny")) is None
