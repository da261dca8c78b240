"""vLLM's OpenAI-compatible server on a ghosted folder, asked by the real client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.tiny_engines import byte_tokenizer, engine_model, ghosted, greedy_tokens

from ghosted_fast.checkpoint.save import save_model

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

# Ends the wait for a server that never answers; no speed is measured.
START_SECONDS = 420
MODEL = ghosted(engine_model(), (3,), first_state=True)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("server")
    save_model(MODEL, folder / "ghosted", byte_tokenizer())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    settings.setdefault("OMP_NUM_THREADS", "1")
    settings.pop("PYTHONPATH", None)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", "ghosted", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "128", "--kv-cache-memory-bytes", str(1 << 28)]
    log = folder / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--enforce-eager"], cwd=folder, env=settings, stdout=file, stderr=file
        )
    found = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                found.models.list()
                break
            except openai.APIConnectionError:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[
                    -4000:
                ]
                time.sleep(1.0)
        yield found
    finally:
        server.terminate()
        server.wait(60)


def test_completion_and_streaming(client: Any) -> None:
    prompt = [1, 50, 90, 177, 30, 44]
    options = {"model": "ghosted", "prompt": prompt, "max_tokens": 16, "temperature": 0.0}
    extra = {"ignore_eos": True, "return_token_ids": True}
    whole = client.completions.create(**options, extra_body=extra)
    assert whole.usage.completion_tokens == 16
    assert whole.choices[0].token_ids == greedy_tokens(MODEL, prompt, 16)
    parts = list(client.completions.create(**options, extra_body=extra, stream=True))
    assert len(parts) > 4
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
