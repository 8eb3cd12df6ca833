"""Text generation by transformers' own means: a pipeline, and a server, end to end on a CPU."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline
from transformers.utils.import_utils import is_serve_available

import crosslayer  # noqa: F401 (makes its models known)
from family_cases import FAMILY_CASES
from tiny_finetune import tiny_tokenizer

PROMPTS = ["the story and the song", "a very bright film"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def checkpoint(request, tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp(request.param), tiny_tokenizer()
    case, own = FAMILY_CASES[request.param], {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    case.model(vocab_size=len(tokenizer), tie_word_embeddings=False, **own).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def continued(folder, prompt, new):
    """The definition: the likeliest token, the whole text anew each time."""
    tokenizer, model = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    ids = start = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(new):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert len(ids[0, start.shape[1] :].unique()) > 1
    return tokenizer.decode(ids[0, start.shape[1] :])


def test_pipeline(checkpoint):
    generate = pipeline("text-generation", model=str(checkpoint), device="cpu")
    assert type(generate.model).__module__.startswith("crosslayer.crnet.")
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    for cache in (None, "static"):
        answers = generate(PROMPTS, cache_implementation=cache, **options)
        assert [answer[0]["generated_text"] for answer in answers] == [continued(checkpoint, p, 6) for p in PROMPTS]


def ask(port, path, **body):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"http://localhost:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="transformers' server is not installed (transformers[serving])")
def test_server(checkpoint):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "crosslayer", "serve", str(checkpoint), "--device", "cpu", "--port", str(port)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    ) as server:
        try:
            for _ in range(600):
                try:
                    ask(port, "/health")
                    break
                except urllib.error.URLError:
                    assert server.poll() is None, server.stderr.read()
                    time.sleep(0.2)
            for prompt in PROMPTS:
                options = {"model": str(checkpoint), "max_tokens": 6, "temperature": 0}
                answer = ask(port, "/v1/completions", prompt=prompt, **options)
                assert answer["choices"][0]["text"] == continued(checkpoint, prompt, 6)
                assert answer["usage"]["completion_tokens"] == 6
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)


def test_what_cannot_be_served_is_one_line(checkpoint, tmp_path):
    def said(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "crosslayer", "serve", *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr.count("crosslayer: error: ") == 1
        return done.stderr

    assert "is not a checkpoint: it has no config.json" in said(tmp_path)
    assert ("'--port'" if is_serve_available() else "transformers[serving]") in said(checkpoint, "--port", "none")
