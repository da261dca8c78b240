"""Every file that people bring, damaged in every way: no foreign error, nothing wrong accepted.

`GHOSTED_FAST_FUZZ=20` multiplies how many inputs there are; `GHOSTED_FAST_FUZZ_SEED` changes them.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_gguf import write_gguf_model
from support.tiny_text import TEXT, tiny_tokenizer

from fuzz.damages import BYTES, damaged_copy, flip, scramble, truncate
from fuzz.judge import Outcomes
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.models.checked.gguf_header import read_gguf_header
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.loading import load_model
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import random_tokens, tiny_model
from ghosted_fast.text.loading import load_texts, token_batches

TIMES = int(os.environ.get("GHOSTED_FAST_FUZZ", "1"))
SEED = int(os.environ.get("GHOSTED_FAST_FUZZ_SEED", "0"))
TOKENS = random_tokens(1, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS).logits
    return found


def check(outcomes: Outcomes, least: int) -> None:
    assert outcomes.total >= least
    assert not outcomes.foreign, "\n".join(outcomes.foreign[:20])
    assert not outcomes.wrong, "\n".join(outcomes.wrong[:20])
    assert len(outcomes.unclear) <= 0.01 * outcomes.total, "\n".join(outcomes.unclear[:20])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ghost = GhostLinear(32, bias=True, norm_eps=1e-6, first_state=True)
    other = GhostLinear(32, norm_eps=1e-5)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in (*ghost.parameters(), *other.parameters()):
            parameter.normal_(0.0, 0.1)
    other.quantize("int8")
    model = remove_layers(tiny_model("llama", 4), [1, 3], [ghost, other])
    return save_model(model, tmp_path_factory.mktemp("ghosted") / "model", tiny_tokenizer())


@pytest.mark.slow
def test_ghosted_folders(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHOSTED_FAST_VERIFY", "1")
    chance, outcomes = random.Random(SEED), Outcomes()
    model, tokenizer = load_model(folder)
    expected, words = logits(model), tokenizer(TEXT)["input_ids"]
    needed = ["config.json", "model.safetensors", "digests.json", "tokenizer.json"]
    names = needed * 3 + sorted({path.name for path in folder.iterdir()} - set(needed))
    for turn in range(240 * TIMES):
        name = names[turn % len(names)]
        said = damaged_copy(folder, tmp_path / "model", name, chance)

        def right(found: Any, said: str = said) -> bool:
            # A value of the dense configuration or of the tokenizer that is valid is taken.
            if said.startswith(("config.json", "tokenizer", "generation")):
                return "/ghost" not in said or torch.equal(logits(found[0]), expected)
            return torch.equal(logits(found[0]), expected) and found[1](TEXT)["input_ids"] == words

        outcomes.judge(said, lambda: load_model(tmp_path / "model"), right)
    check(outcomes, 240)
    assert outcomes.counts["error"] > 120


TEXTS = {
    "a.txt": "\n\n".join([TEXT] * 8),
    "a.jsonl": "".join(json.dumps({"text": TEXT, "id": i}) + "\n" for i in range(8)),
    "chat.jsonl": "".join(
        json.dumps({"messages": [{"role": "user", "content": TEXT}] * 2}) + "\n" for _ in range(8)
    ),
    "a.json": json.dumps([{"text": TEXT}] * 8),
    "around.json": json.dumps({"data": [{"text": TEXT}] * 8}, indent=2),
    "a.csv": "id,text\n" + "".join(f'{i},"{TEXT}"\n' for i in range(8)),
    "a.tsv": "id\ttext\n" + "".join(f"{i}\t{TEXT}\n" for i in range(8)),
}


def test_texts(tmp_path: Path) -> None:
    chance, outcomes = random.Random(SEED + 1), Outcomes()
    source = tmp_path / "source"
    source.mkdir()
    for name, content in TEXTS.items():
        (source / name).write_text(content)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [TEXT] * 8}), source / "a.parquet")
    for codec, suffix in (("gzip", "gz"), ("zstd", "zst")):
        data = pyarrow.compress(TEXTS["a.jsonl"].encode(), codec=codec, asbytes=True)
        (source / f"b.jsonl.{suffix}").write_bytes(data)
    names = sorted(path.name for path in source.iterdir())
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    for turn in range(700 * TIMES):
        name = names[turn % len(names)]
        said = damaged_copy(source, tmp_path / "damaged", name, chance)
        path = tmp_path / "damaged" / name

        def run(path: Path = path) -> Any:
            texts = list(load_texts(path, tokenizer=tokenizer))
            return token_batches(tokenizer, [*texts, TEXT, TEXT], 32, sequence_length=16)

        outcomes.judge(said, run, lambda found: found[0].shape[1] == 16)
    check(outcomes, 700)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "damaged"}


def test_gguf_files(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = tmp_path / "source"
    source.mkdir()
    writer = gguf.GGUFWriter(source / "a.gguf", "llama")
    writer.add_block_count(4)
    writer.add_context_length(128)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    for i in range(4):
        writer.add_tensor(f"blk.{i}.attn_q.weight", torch.zeros(32, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = read_gguf_header(source / "a.gguf")
    assert (whole.of_family("block_count"), len(whole.shapes)) == (4, 4)
    assert whole.bytes_needed == (source / "a.gguf").stat().st_size
    chance, outcomes = random.Random(SEED + 2), Outcomes()
    harmless = ("remove", "folder_instead")
    damages = [damage for damage in BYTES if damage.__name__ not in harmless]
    for turn in range(200 * TIMES):
        path = tmp_path / "a.gguf"
        path.write_bytes((source / "a.gguf").read_bytes())
        said = damages[turn % len(damages)](path, chance)
        size = path.stat().st_size if path.is_file() else 0
        outcomes.judge(
            said,
            lambda path=path: read_gguf_header(path),
            lambda found, size=size: found.bytes_needed <= size,
        )
    check(outcomes, 200)


def renamed(path: Path, chance: random.Random) -> str:
    """Change a letter of the name of a tensor."""
    data = path.read_bytes()
    name = chance.choice(re.findall(rb"(?:blk\.\d+|output|token_embd)[a-z_.]*\.weight", data))
    path.write_bytes(data.replace(name, name[:-1] + b"x", 1))
    return f"{name.decode()} renamed"


@pytest.mark.slow
def test_whole_gguf_models(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    write_gguf_model(path)
    whole = path.read_bytes()
    numbers = sum(math.prod(shape) for shape in read_gguf_header(path).shapes.values())
    model, _ = load_model(path)
    expected = logits(model)
    assert Decoder.of(model).name == str(path)
    chance, outcomes = random.Random(SEED + 3), Outcomes()
    ways = [truncate, flip, scramble, renamed]
    for turn in range(80 * TIMES):
        # What a file says of itself is damaged, and not its numbers, of which any are valid.
        way, head = ways[turn % len(ways)], len(whole) - 4 * numbers
        path.write_bytes(whole[:head])
        said = way(path, chance)
        with path.open("ab") as file:
            file.write(whole[head:])

        def run() -> list[torch.Tensor]:
            found = []
            for seed in (0, 1):
                torch.manual_seed(seed)
                found.append(logits(load_model(path)[0]))
            return found

        def right(found: list[torch.Tensor], way: Any = way) -> bool:
            # A setting that is valid is taken; nothing that is computed with is left to chance.
            return torch.equal(*found) and (
                way in (flip, scramble) or torch.equal(found[0], expected)
            )

        outcomes.judge(said, run, right)
    check(outcomes, 80)
    assert outcomes.counts["error"] > 30
