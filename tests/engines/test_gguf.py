"""What is written into a GGUF file, and what is refused; test_llamacpp.py runs the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_engines import VOCABULARY_SIZE, byte_tokenizer, engine_model, ghosted

from ghosted_fast.errors import ArgumentError, MissingExtraError, SourceError, UnsupportedModelError
from ghosted_fast.export import gguf as export_module
from ghosted_fast.export.gguf import check_exportable, export_gguf

gguf = pytest.importorskip("gguf")
EPS = 1e-6


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def test_each_ghost_is_a_block(tmp_path: Path) -> None:
    model = ghosted(engine_model(), (0, 3, 4), norm_eps=EPS)
    path = export_gguf(model, tmp_path / "m" / "model.gguf", byte_tokenizer())
    fields, tensors = read(path)
    assert fields["general.architecture"] == "deci"
    assert fields["deci.block_count"] == 5
    assert fields["deci.attention.head_count_kv"] == [0, 2, 2, 0, 2]
    first = model.model.layers[0].input_ghost.weight.detach().numpy()
    assert np.array_equal(tensors["blk.0.attn_output.weight"].data, first)
    assert not tensors["blk.3.ffn_down.weight"].data.any()
    assert [path.name for path in path.parent.iterdir()] == ["model.gguf"]


def test_matrices_are_stored_as_asked(tmp_path: Path) -> None:
    model = ghosted(engine_model(), (3,), norm_eps=EPS)
    weight = model.model.layers[2].ghost.weight.detach().numpy()
    for precision, kind, bound in (("f16", "F16", 1e-3), ("q8_0", "Q8_0", 1e-2)):
        path = export_gguf(model, tmp_path / precision, byte_tokenizer(), precision)
        tensor = read(path)[1]["blk.3.attn_output.weight"]
        assert tensor.tensor_type.name == kind
        stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert 0 < np.abs(stored - weight).max() < bound * np.abs(weight).max()


def test_a_quantized_ghost_is_written_as_what_it_computes(tmp_path: Path) -> None:
    model = ghosted(engine_model(), (3,), norm_eps=EPS, quantized=True)
    ghost = model.model.layers[2].ghost
    path = export_gguf(model, tmp_path / "model.gguf", byte_tokenizer())
    expected = (ghost.weight.float() * ghost.scale[:, None]).numpy()
    assert np.array_equal(read(path)[1]["blk.3.attn_output.weight"].data, expected)


def test_the_tokenizer_of_a_gguf_file_is_copied(tmp_path: Path) -> None:
    model = engine_model()
    first = export_gguf(model, tmp_path / "first.gguf", byte_tokenizer())
    second = export_gguf(model, tmp_path / "second.gguf", first)
    ours = [
        {name: value for name, value in read(path)[0].items() if name.startswith("tokenizer.")}
        for path in (first, second)
    ]
    assert ours[0] == ours[1]
    assert ours[0]["tokenizer.ggml.tokens"][1] == "<s>"
    assert ours[0]["tokenizer.ggml.pre"] == "gpt-2"
    assert len(ours[0]["tokenizer.ggml.tokens"]) == VOCABULARY_SIZE
    small = engine_model(vocab_size=270)
    with pytest.raises(SourceError, match=r"270 tokens, the model's.*got 288"):
        export_gguf(small, tmp_path / "third.gguf", first)
    with pytest.raises(SourceError, match="no file"):
        export_gguf(model, tmp_path / "third.gguf", tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(SourceError, match="as GGUF"):
        export_gguf(model, tmp_path / "third.gguf", tmp_path / "text.gguf")
    with pytest.raises(SourceError, match="at most 260 tokens"):
        export_gguf(engine_model(vocab_size=260), tmp_path / "third.gguf", byte_tokenizer())
    assert not (tmp_path / "third.gguf").exists()


def test_an_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(SourceError, match="--tokenizer FILE"):
        export_gguf(engine_model(), tmp_path / "model.gguf", tokenizer)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "layer 2 is applied to the hidden state itself"),
        ({"norm_eps": EPS, "bias": True}, "has a bias"),
        ({"norm_eps": EPS, "first_state": True}, "a state for first tokens"),
        ({"norm_eps": 1e-3}, "norm_eps 0.001"),
    ],
)
def test_a_ghost_without_a_place_is_refused(options: dict[str, Any], said: str) -> None:
    model = ghosted(engine_model(), (3,), **options)
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        check_exportable(model)
    assert "--features normed --no-bias --first-state off" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "sizes", "said"),
    [
        ("gemma2", {}, "got 'gemma2': it norms what its parts add. Serve"),
        ("llama", {"hidden_act": "gelu"}, "config.hidden_act = silu, got gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'",
        ),
    ],
)
def test_a_model_unlike_llama_is_refused(family: str, sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        check_exportable(engine_model(family, **sizes))


def test_arguments_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = engine_model(num_layers=1), tmp_path / "model.gguf"
    with pytest.raises(ArgumentError, match="f32, f16 or q8_0"):
        export_gguf(model, path, byte_tokenizer(), "int4")  # type: ignore[arg-type]
    path.write_text("mine")
    with pytest.raises(ArgumentError, match="or overwrite"):
        export_gguf(model, path, byte_tokenizer())
    export_gguf(model, path, byte_tokenizer(), overwrite=True)
    assert read(path)[0]["deci.block_count"] == 1
    with pytest.raises(ArgumentError, match="name another file"):
        export_gguf(model, tmp_path, byte_tokenizer(), overwrite=True)
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"ghosted_fast\[gguf\]"):
        export_gguf(model, path, byte_tokenizer())


def test_window_and_rope_are_written(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    model = engine_model("mistral", sliding_window=100, rope_parameters=rope)
    fields, tensors = read(export_gguf(model, tmp_path / "model.gguf", byte_tokenizer()))
    assert fields["deci.context_length"] == 100
    assert np.allclose(tensors["rope_freqs.weight"].data, 4.0)
