"""A sweep of a device: of a GPU where there is one, else of simulated streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.simulated_streams import SimulatedStreams
from support.swept_models import as_pickles, killed_at_write, saved, text
from support.tiny_text import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import ghosted_fast as gf
from ghosted_fast.errors import ArgumentError, CalibrationError, NonFiniteError
from ghosted_fast.fit.sweep import plan as plan_module
from ghosted_fast.fit.sweep.shelf import DeviceShelf, FolderShelf, MemoryShelf
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.models.unloaded.source import FolderSource
from ghosted_fast.models.unloaded.transfers import StateCopies
from ghosted_fast.options import Count, GhostOptions
from ghosted_fast.surgery.folder import FolderCut
from ghosted_fast.swept import asked as asked_module
from ghosted_fast.swept import run as run_module
from ghosted_fast.swept.asked import Asked
from ghosted_fast.testing import random_tokens, relative_rms
from ghosted_fast.text.batches import iterate_batches

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# As of a ghost that is fitted in a model on a GPU; the processor's copies change no bit.
GHOSTS, SCORES = 1e-2, 1e-3


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[SimulatedStreams]:
    """Let the processor sweep as a device does; the streams of the sweeps are noted."""
    found: list[SimulatedStreams] = []

    def streams(_: torch.device) -> SimulatedStreams:
        found.append(SimulatedStreams(len(found), computes_at_once=True))
        return found[-1]

    monkeypatch.setattr(run_module, "streams_of", streams)
    return found


def swept(folder: Path, out: Path, device: str = "cpu", **asked: Any) -> tuple[Any, Any]:
    """Return the tensors in the folder that comes of a sweep, and the report."""
    run = gf.RunOptions(**{"score_tokens": 64, **asked.pop("run", {}), "device": device})
    cut, report = gf.ghost_model(open_unloaded(folder), text(), run=run, **asked)
    assert isinstance(cut, FolderCut)
    files = cut.save(out, overwrite=True).glob("*.safetensors")
    return {name: t for path in sorted(files) for name, t in load_file(path).items()}, report


def on_both(
    folder: Path, device: str, simulated: list[SimulatedStreams], **asked: Any
) -> tuple[Any, Any]:
    """Sweep on the processor and on a device; return both reports, the folders compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "streams_of", lambda _: None)
        expected, plain = swept(folder, folder.parent / "plain", **asked)
    if device == "cuda":
        with pytest.MonkeyPatch.context() as patch:
            from ghosted_fast.models.unloaded.transfers import streams_of

            patch.setattr(run_module, "streams_of", streams_of)
            found, report = swept(folder, folder.parent / "found", device, **asked)
    else:
        found, report = swept(folder, folder.parent / "found", **asked)
        assert simulated, "it went by streams"
    assert report.removed == plain.removed and found.keys() == expected.keys()
    for name, tensor in found.items():
        if device == "cpu" or "ghost" not in name:
            assert torch.equal(tensor, expected[name]), name
        else:
            assert relative_rms(tensor, expected[name]) <= GHOSTS, name
    for one, other in zip(report.scores, plain.scores, strict=True):
        assert one.score == pytest.approx(other.score, rel=0.0 if device == "cpu" else SCORES)
    return report, plain


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gemma3_text"])
def test_layers_and_ghosts_are_those_of_the_processor(
    tmp_path: Path, device: str, family: str, simulated: list[SimulatedStreams]
) -> None:
    saved(tmp_path / "dense", family)
    on_both(tmp_path / "dense", device, simulated, remove=2, run={"corrections": 0})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kept", ["memory", "files"])
def test_ghosts_are_corrected(
    tmp_path: Path, device: str, kept: str, simulated: list[SimulatedStreams]
) -> None:
    saved(tmp_path / "dense", "llama")
    run = {"corrections": 1} | ({"state": tmp_path / "states"} if kept == "files" else {})
    report, plain = on_both(tmp_path / "dense", device, simulated, removed=[1, 3, 4], run=run)
    (one,), (other,) = report.corrections, plain.corrections
    assert one.accepted and one.after == pytest.approx(other.after, rel=1e-2)
    assert not (tmp_path / "states").exists()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "asked",
    [
        {"remove": 2, "criterion": "streamline", "recovery": "nbl"},
        {"remove": 3, "criterion": "lorp", "recovery": "linearpatch-r"},
        {"removed": [1, 3], "recovery": "ghost-paper"},
        {"removed": [0, 5], "options": GhostOptions(bias=True, first_state="on")},
    ],
    ids=lambda asked: "-".join(str(value) for value in asked.values())[:40],
)
def test_with_other_criteria_and_recoveries(
    tmp_path: Path, device: str, asked: dict[str, Any], simulated: list[SimulatedStreams]
) -> None:
    saved(tmp_path / "dense", "llama")
    on_both(tmp_path / "dense", device, simulated, **asked, run={"corrections": 0})


@pytest.mark.parametrize("device", DEVICES)
def test_weights_of_another_dtype_are_converted_there(
    tmp_path: Path, device: str, simulated: list[SimulatedStreams]
) -> None:
    """Files of torch.save hold some in fp32, of which the model wants bf16."""
    saved(tmp_path / "dense", "llama", torch.bfloat16)
    as_pickles(tmp_path / "dense")
    for path in sorted((tmp_path / "dense").glob("*.bin"))[::2]:
        held = torch.load(path, weights_only=True)
        torch.save({name: tensor.float() for name, tensor in held.items()}, path)
    on_both(tmp_path / "dense", device, simulated, removed=[2], run={"corrections": 0})


def test_a_copy_that_nobody_waits_for_shows(
    tmp_path: Path, simulated: list[SimulatedStreams], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedStreams, "wait", lambda streams, event: None)
    saved(tmp_path / "dense", "llama")
    with pytest.raises(NonFiniteError):
        swept(tmp_path / "dense", tmp_path / "out", removed=[2], run={"corrections": 0})


def test_a_layer_is_read_into_page_locked_memory_once(
    tmp_path: Path, simulated: list[SimulatedStreams], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "dense", "llama")
    taken: list[int] = []
    fill = SimulatedStreams.fill

    def noted(streams: SimulatedStreams, there: Any, held: Any, after: Any) -> Any:
        taken.append(there.data_ptr())
        return fill(streams, there, held, after)

    monkeypatch.setattr(SimulatedStreams, "fill", noted)
    swept(tmp_path / "dense", tmp_path / "out", remove=2, run={"corrections": 0})
    assert len(taken) == 6 and len(set(taken)) == 2, "in turn, into two buffers"
    assert taken[::2] == taken[:1] * 3


def test_a_run_that_is_stopped_goes_on_with_the_same_bits(
    tmp_path: Path, simulated: list[SimulatedStreams]
) -> None:
    saved(tmp_path / "dense", "llama")
    run = {"corrections": 1, "state": tmp_path / "states"}
    plain, _ = swept(tmp_path / "dense", tmp_path / "out", remove=2, run={"corrections": 1})
    for number in (9, 40, 20):
        with killed_at_write(number) as met:
            swept(tmp_path / "dense", tmp_path / "out", remove=2, run=run)
        assert met == [number] and (tmp_path / "states").exists()
    found, _ = swept(tmp_path / "dense", tmp_path / "out", remove=2, run=run)
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_a_layer_that_was_read_for_nothing_is_left(tmp_path: Path) -> None:
    model = saved(tmp_path / "dense", "llama")
    streams = SimulatedStreams(computes_at_once=True)
    source = FolderSource(open_unloaded(tmp_path / "dense"), streams=streams)
    for index, then in ((0, 1), (3, 4), (4, None), (1, 2), (2, 3)):
        with source.layer(index, then) as layer:
            expected = model.model.layers[index].state_dict()
            for name, tensor in layer.state_dict().items():
                assert torch.equal(tensor, expected[name]), (index, name)
    assert all(parameter.is_meta for parameter in source.decoder.model.parameters())


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_a_shelf_keeps_on_the_host_what_a_device_computes(tmp_path: Path, kind: str) -> None:
    inner = MemoryShelf() if kind == "memory" else FolderShelf(tmp_path / "s", "digest")
    streams = SimulatedStreams(computes_at_once=True)
    shelf = DeviceShelf(inner, StateCopies(streams))
    tensors = [torch.randn(2, 3) for _ in range(4)]
    for number, tensor in enumerate(tensors):
        shelf.add("ab"[number % 2], tensor)
    streams.run_until(None)
    assert torch.equal(inner.get("b", 0), tensors[1])
    assert torch.equal(shelf.get("b", 1), tensors[3]), "the last one was on its way"
    shelf.add("a", tensors[0])
    shelf.keep({"boundary": 3})
    assert torch.equal(inner.get("a", 2), tensors[0])
    assert shelf.goes_on == inner.goes_on
    assert shelf.kept() == (None if kind == "memory" else {"boundary": 3}) and (
        shelf.facts == inner.facts
    )
    shelf.add("a", tensors[1])
    shelf.drop("a")
    with pytest.raises(KeyError):
        shelf.get("a", 0)
    if kind == "files":
        shelf.add("b", tensors[1])
        shelf.forget()
        assert shelf.facts == {} and not list((tmp_path / "s").glob("*"))


def test_a_shelf_puts_down_in_order_and_no_sooner_than_it_must() -> None:
    """What was added last is on its way until another comes, or its own list is asked for."""

    class Noted(MemoryShelf):
        def add(self, name: str, states: torch.Tensor) -> None:
            done.append((name, int(states)))
            super().add(name, states)

        def drop(self, name: str) -> None:
            done.append((name, None))
            super().drop(name)

    done: list[tuple[str, int | None]] = []
    shelf = DeviceShelf(Noted(), StateCopies(SimulatedStreams(computes_at_once=True)))

    def added(name: str, number: int) -> list[tuple[str, int | None]]:
        shelf.add(name, torch.tensor(float(number)))
        return told()

    def told() -> list[tuple[str, int | None]]:
        taken = done.copy()
        done.clear()
        return taken

    assert added("a", 1) == []
    assert added("a", 2) == [("a", 1)]
    assert added("b", 3) == [("a", 2)]
    assert shelf.get("a", 1) == 2 and told() == [], "nobody asked for b"
    assert shelf.get("b", 0) == 3 and told() == [("b", 3)]
    assert added("b", 4) == []
    shelf.drop("a")
    assert told() == [("a", None)]
    shelf.drop("b")
    assert told() == [("b", 4), ("b", None)], "it is not put down behind its list's end"
    assert added("b", 5) == []
    shelf.keep({})
    assert told() == [("b", 5)] and shelf.get("b", 0) == 5
    assert added("c", 6) == []
    shelf.forget()
    assert added("c", 7) == [] and shelf.get("c", 0) == 7, "6 was forgotten"


def given_device(monkeypatch: pytest.MonkeyPatch, device: int, host: int) -> None:
    """Have a CUDA device with some free memory, beside a host with some."""
    free = {"cuda": device, "cpu": host}
    monkeypatch.setattr(asked_module, "device_named", torch.device)
    monkeypatch.setattr(asked_module, "free_memory", lambda place: free[place.type])


@pytest.mark.parametrize(
    ("memory", "device", "host", "said"),
    [
        (None, 10**10, 10**10, "of the host's memory on the way to the device, of 8.0 GB allowed"),
        (None, 10**5, 10**10, r"on cuda:0, of 0.0 GB allowed: it is swept through layer by layer"),
        (None, 10**10, 10**5, "on the way to the device, of 0.0 GB allowed: it is swept through"),
        (10**5, 10**10, 10**10, r"on cuda:0, of 0.0 GB allowed: it is swept through"),
    ],
)
def test_free_memory_of_both_decides(
    tmp_path: Path,
    memory: int | None,
    device: int,
    host: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved(tmp_path, "llama")
    given_device(monkeypatch, device, host)
    caplog.set_level("INFO")
    run = gf.RunOptions(device="cuda:0", memory=memory)
    asked = Asked(Count(2), "ghost", "ghost", GhostOptions(), run)
    loads = run_module.fits(open_unloaded(tmp_path), list(iterate_batches(text())), asked)
    assert loads == ("swept" not in said)
    assert said in caplog.text


def test_what_is_short_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "llama")
    unloaded, batches = open_unloaded(tmp_path), list(iterate_batches(text()))

    def plan(device: int, host: int, memory: int | None = None) -> Any:
        given_device(monkeypatch, device, host)
        run = gf.RunOptions(device="cuda:0", memory=memory)
        return Asked(Count(2), "ghost", "ghost", GhostOptions(), run).plan(unloaded, batches)

    both = plan(10**10, 10**10)
    assert min(both.device_bytes, both.memory_bytes) > plan_module.PROGRAM_BYTES
    with pytest.raises(CalibrationError, match=r"at least 0\.6 GB of the device's memory to sweep"):
        plan(10**8, 10**10)
    with pytest.raises(CalibrationError, match=r"GB of the device's memory .* got 0\.1 GB"):
        plan(10**10, 10**10, memory=10**8)
    with pytest.raises(CalibrationError, match=r"at least 0\.6 GB of the host's memory to sweep"):
        plan(10**10, 10**8)


def test_devices_that_cannot_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "llama")
    for source in (tmp_path, open_unloaded(tmp_path)):
        for name in ("cuda:77", "toaster"):
            with pytest.raises(ArgumentError, match=f"a device of this machine, got '{name}'"):
                gf.ghost_model(source, text(), 2, run=gf.RunOptions(device=name))
    monkeypatch.setattr(asked_module, "device_named", torch.device)
    with pytest.raises(ArgumentError, match=r"one of cpu, cuda as the device .* got 'mps'"):
        gf.ghost_model(open_unloaded(tmp_path), text(), 2, run=gf.RunOptions(device="mps"))


@pytest.mark.slow
def test_no_tensor_of_the_host_meets_one_of_the_device(tmp_path: Path) -> None:
    """On a device that is simulated in a process of its own."""
    for family in ("llama", "gpt2"):
        saved(tmp_path / family, family)
    words = [sys.executable, "-m", "support.simulated_device", str(tmp_path)]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("corrections", [0, 1])
def test_memory_of_the_gpu_is_that_of_the_plan(
    tmp_path: Path, corrections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model of 880 MB, with 64 MB for what libraries take on the device."""
    monkeypatch.setattr(plan_module, "PROGRAM_BYTES", 64 << 20)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 2048}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    unloaded = open_unloaded(tmp_path / "dense")
    batches = [random_tokens(4, 128, seed=seed) for seed in range(10)]
    run = gf.RunOptions(device="cuda", corrections=corrections, state=tmp_path / "states")
    asked = Asked(Count(3), "ghost", "ghost", GhostOptions(), run)
    plan = asked.plan(unloaded, list(iterate_batches(batches)))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cut, report = gf.ghost_model(unloaded, batches, 3, run=run)
    assert isinstance(cut, FolderCut) and len(report.corrections) == corrections
    assert torch.cuda.max_memory_allocated() - before <= plan.device_bytes < unloaded.nbytes
