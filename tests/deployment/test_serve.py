"""`transformers serve` answers for a ghosted folder, with this package and without it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.dense_reference import NUM_LAYERS, REMOVED, random_ghosts
from support.tiny_text import tiny_tokenizer
from transformers.utils.import_utils import is_serve_available

from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import tiny_model

pytestmark = pytest.mark.slow

if not is_serve_available():
    pytest.skip("the server needs: pip install 'transformers[serving]'", allow_module_level=True)

# Ends the wait for a server that never answers; no speed is measured.
START_SECONDS = 240
NEW_TOKENS = 6
MESSAGE = "the cat sat on the mat"
MAIN = "from transformers.cli.transformers import main; main()"
WAYS = {
    "package_installed": ("", ["--trust-remote-code"]),
    "file_alone": ("import sys; sys.modules['ghosted_fast'] = None; ", ["--trust-remote-code"]),
    "package_imported": (
        "import ghosted_fast; ",
        ["--continuous-batching", "--cb-num-blocks", "16", "--cb-max-batch-tokens", "64"],
    ),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a ghosted folder, and its greedy answer to the message."""
    model = remove_layers(tiny_model("llama", NUM_LAYERS), REMOVED, random_ghosts())
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    folder = save_model(model, tmp_path_factory.mktemp("served") / "ghosted", tokenizer)
    ids = tokenizer(MESSAGE, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
    return folder, tokenizer.decode(answer, skip_special_tokens=True)


@contextmanager
def server(folder: Path, before: str, options: list[str], work: Path) -> Iterator[Any]:
    """Serve a folder from a process of its own, and yield a client."""
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", before + MAIN, "serve", str(folder), *options]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    settings = {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    log = work / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                client.get("../health", cast_to=object)
                break
            except openai.APIConnectionError:
                running = process.poll() is None and time.monotonic() < deadline
                assert running, log.read_text()[-4000:]
                time.sleep(0.2)
        yield client
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("way", WAYS)
def test_chat_completion(served: tuple[Path, str], tmp_path: Path, way: str) -> None:
    folder, expected = served
    question: dict[str, Any] = {
        "model": str(folder),
        "messages": [{"role": "user", "content": MESSAGE}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0.0,
    }
    with server(folder, *WAYS[way], tmp_path) as client:
        answer = client.chat.completions.create(**question)
        parts = list(client.chat.completions.create(**question, stream=True))
    assert answer.choices[0].message.content == expected
    streamed = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "".join(streamed) == expected and len(streamed) > 2
