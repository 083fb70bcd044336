"""Engines in processes of their own: the OpenAI server over HTTP, and two ranks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

pytest.importorskip("vllm.v1", reason="vllm isn't installed; make test-vllm runs these tests")

import vllm_second_runner
from adakv.vllm.config import Settings
from adakv.vllm.ledger import Counts, path_of, remove_unused
from adakv.vllm.plan import plan
from vllm_engine import (
    ENVIRONMENT,
    Compression,
    is_on_cuda,
    of_device,
    random_text,
    save_llama,
)
from vllm_reference import Reference, comparable


@pytest.fixture
def environment() -> dict[str, str]:
    """The variables of processes that find what this one finds."""
    return os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class Server(NamedTuple):
    """A server that answers."""

    address: str
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def server(
    model: str,
    environment: dict[str, str],
    log: Path,
    *options: str,
    settings: Settings = Settings(budget=64),  # noqa: B008
) -> Iterator[Server]:
    """A server with compression, until then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--port", str(port), "--host", "127.0.0.1", "--served-model-name", "llama"]
    command += ["--skip-tokenizer-init", "--dtype", "float32"]
    command += ["--block-size", "32", "--max-model-len", "1024", "--max-num-seqs", "8"]
    command += ["--additional-config", json.dumps({"adakv": asdict(settings)})]
    for name, value in of_device(is_compressed=True).items():
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    command += options
    environment = environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 600
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            has_time = time.monotonic() < deadline
            assert process.poll() is None and has_time, log.read_text()[-3000:]
            time.sleep(0.5)
        yield Server(address, process)
    finally:
        process.terminate()
        process.wait(timeout=300)


def counts_of(address: str) -> dict[str, int]:
    """The server's metrics of this plugin."""
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    found = re.findall(r'^adakv:(\w+)_total\{engine="0"\} (\S+)$', text, re.MULTILINE)
    return {name: int(float(value)) for name, value in found}


def test_server_streams_and_counts(tmp_path: Path, environment: dict[str, str]):
    """A spawned engine behind HTTP, read by the OpenAI client."""
    from openai import BadRequestError, OpenAI

    model = save_llama(tmp_path / "model")
    prompt = [i * 7 % 256 for i in range(400)]
    with server(model, environment, tmp_path / "log") as (address, _):
        assert counts_of(address) == dict.fromkeys(counts_of(address), 0)
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        stream = client.completions.create(
            model="llama",
            prompt=prompt,
            max_tokens=20,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "detokenize": False, "return_token_ids": True},
        )
        tokens = [t for part in stream for t in getattr(part.choices[0], "token_ids", None) or []]
        counts = counts_of(address)
        answer = {"model": "llama", "prompt": prompt, "max_tokens": 5}
        for wish, is_refused in (('{"budget": 65}', True), ('{"policy": "off"}', False)):
            body = {"ignore_eos": True, "detokenize": False, "vllm_xargs": {"adakv": wish}}
            if is_refused:
                with pytest.raises(BadRequestError, match="at most the engine's 64, got 65"):
                    client.completions.create(**answer, extra_body=body)
            else:
                client.completions.create(**answer, extra_body=body)
        found = 11 * 32  # of the same prompt, up to the policy's window
        assert counts_of(address) == counts | {"prefix_tokens_found": found}
    planned = plan(400, budget=64, block_size=32, num_kv_heads=2)
    assert len(tokens) == 20
    assert set(counts) == set(Counts._fields)
    assert counts["requests_compressed"] == 1
    assert counts["blocks_given_back"] == planned.tail - planned.kept_blocks
    assert counts["entries_read"] == 3 * 2 * 400
    assert 3 * 2 * 64 <= counts["entries_kept"] <= 3 * 2 * (64 + 31)


def test_server_compresses_under_pressure(tmp_path: Path, environment: dict[str, str]):
    """Eight clients at once in a pool for three whole requests, before that one alone."""
    from openai import OpenAI

    model, rng = save_llama(tmp_path / "model"), random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(400)] for _ in range(8)]
    pool, settings = ("--num-gpu-blocks-override", "46"), Settings(budget=64, when="pressure")
    with server(model, environment, tmp_path / "log", *pool, settings=settings) as (address, _):
        client = OpenAI(base_url=f"{address}/v1", api_key="none")

        def ask(prompt: list[int]) -> int:
            body = {"ignore_eos": True, "detokenize": False}
            answer = client.completions.create(
                model="llama", prompt=prompt, max_tokens=60, extra_body=body
            )
            return answer.usage.completion_tokens

        assert ask(prompts[0]) == 60
        assert counts_of(address)["requests_compressed"] == 0
        with ThreadPoolExecutor(8) as clients:
            assert list(clients.map(ask, prompts)) == [60] * 8
        counts = counts_of(address)
        metrics = urllib.request.urlopen(f"{address}/metrics").read().decode()
    (preemptions,) = re.findall(r"^vllm:num_preemptions_total{.*} (\S+)$", metrics, re.MULTILINE)
    assert float(preemptions) == 0
    assert counts["compressed_under_pressure"] == counts["requests_compressed"] >= 3
    assert counts["preemptions_avoided"] <= counts["requests_compressed"]


#: What each of some clients asks for, and what it comes to: budget and protected spans.
WISHES: list[tuple[dict[str, Any], int, tuple[tuple[int, int], ...]]] = [
    ({}, 64, ()),
    ({"budget": 48}, 48, ()),
    ({"policy": "off"}, 1024, ()),
    ({"protect_prefix": 20}, 64, ((0, 20),)),
    ({"budget": 60, "protect": [[100, 110], [200, 205]]}, 60, ((100, 110), (200, 205))),
    ({"protect_prefix": 10, "protect": [[300, 310]]}, 64, ((0, 10), (300, 310))),
]


def test_clients_of_a_server_get_what_they_ask_for(tmp_path: Path, environment: dict[str, str]):
    """All at once, twice: the second time their prompts are in the prefix cache."""
    from openai import OpenAI

    model, rng = save_llama(tmp_path / "model"), random.Random(5)
    prompts = [random_text(rng, rng.randint(330, 420)) for _ in WISHES]
    settings = Settings("snapkv", 64, "exact")
    with server(model, environment, tmp_path / "log", settings=settings) as (address, _):
        client = OpenAI(base_url=f"{address}/v1", api_key="none")

        def ask(number: int) -> list[int]:
            body = {"ignore_eos": True, "detokenize": False, "return_token_ids": True}
            answer = client.completions.create(
                model="llama",
                prompt=prompts[number],
                max_tokens=30,
                temperature=0,
                extra_body=body | {"vllm_xargs": {"adakv": json.dumps(WISHES[number][0])}},
            )
            tokens: list[int] = answer.choices[0].token_ids  # type: ignore[attr-defined]
            return tokens

        with ThreadPoolExecutor(len(WISHES)) as clients:
            written, again = (list(clients.map(ask, range(len(WISHES)))) for _ in range(2))
        counts = counts_of(address)
    assert counts["requests_compressed"] == 2 * (len(WISHES) - 1)
    assert counts["prefix_tokens_found"] >= len(WISHES) * 9 * 32
    assert again == written
    found = {}
    for number, (_, budget, spans) in enumerate(WISHES):
        kept = torch.full((3, 2), budget if budget < 1024 else 0)
        compression = Compression(len(prompts[number]), 1, kept)
        reference = Reference(model, replace(settings, budget=budget), protect=spans)
        found[number] = reference.differences(prompts[number], written[number], [compression])
    assert not {number: places for number, places in found.items() if places}


def engine_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The process of a server's engine."""
    children = psutil.Process(process.pid).children(recursive=True)
    (engine,) = [child for child in children if "EngineCore" in "".join(child.cmdline())]
    return engine


def in_shared_memory(process: subprocess.Popen[bytes]) -> set[Path]:
    """What a server and its processes have there."""
    server = psutil.Process(process.pid)
    paths = set()
    for each in [server, *server.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            paths |= {f.path for f in [*each.open_files(), *each.memory_maps()]}
    return {Path(path) for path in paths if path.startswith("/dev/shm/") and Path(path).exists()}


@pytest.mark.parametrize("way", ["SIGTERM", "SIGINT", "engine is killed", "all is killed"])
def test_server_leaves_no_ledger_behind(tmp_path: Path, environment: dict[str, str], way: str):
    """However it ends; where nobody is left to do it, the next one does."""
    model = save_llama(tmp_path / "model")
    with server(model, environment, tmp_path / "log") as (_, process):
        engine = engine_of(process)
        # Other engines of this machine have some of their own.
        (ledger,) = {f.path for f in engine.open_files() if f.path.startswith(str(path_of("")))}
        left = in_shared_memory(process)
        assert Path(ledger) in left
        if "killed" in way:
            if way == "all is killed":
                process.kill()
            engine.kill()
            psutil.wait_procs([engine], timeout=300)  # its lock ends with it
        else:
            process.send_signal(signal.Signals[way])
        process.wait(timeout=300)
    if way == "all is killed":
        remove_unused()
    assert not Path(ledger).exists()
    assert "killed" in way or not [path for path in left if path.exists()]


TWO_RANKS = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        sys.argv[1], tensor_parallel_size=2, enforce_eager=True, dtype="float32", block_size=32,
        max_model_len=1024, skip_tokenizer_init=True, num_gpu_blocks_override=64,
        additional_config={"adakv": json.loads(sys.argv[3])},
    )
    prompts, count = json.loads(sys.argv[2]), int(sys.argv[4])
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False)
    out = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in out]))
"""


def written_by_two_ranks(
    folder: Path,
    environment: dict[str, str],
    prompts: list[list[int]],
    settings: dict[str, Any],
    new_tokens: int,
) -> list[list[int]]:
    """By the model in ``folder / "model"``."""
    script = folder / "two_ranks.py"
    script.write_text(TWO_RANKS)
    given = str(folder / "model"), *map(json.dumps, (prompts, settings, new_tokens))
    done = subprocess.run(
        [sys.executable, str(script), *given],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tokens: list[list[int]] = json.loads(re.search(r"TOKENS (.*)", done.stdout)[1])
    return tokens


def test_two_ranks_keep_their_own_heads(tmp_path: Path, environment: dict[str, str]):
    """Each rank checks its boundaries against the scheduler's plan, for prompts that are compressed
    and for those that aren't; the latter's text is that of one process."""
    model = save_llama(tmp_path / "model", num_kv_heads=4)
    prompts = [
        [i * n % 256 for i in range(length)] for n, length in ((7, 120), (11, 400), (13, 90))
    ]
    tokens = written_by_two_ranks(tmp_path, environment, prompts, {"budget": 128}, 16)
    everything = Reference(model, Settings(budget=500))
    whole = [
        everything.choices(prompt, written, [Compression(len(prompt), 1, torch.zeros(3, 4))])
        for prompt, written in zip(prompts, tokens, strict=True)
    ]
    assert [whole[i] == tokens[i] for i in range(3)] == [True, False, True]


def test_two_ranks_choose_from_texts(tmp_path: Path, environment: dict[str, str]):
    """Where all heads keep equally much, as one process does."""
    model, rng = save_llama(tmp_path / "model", num_kv_heads=4), random.Random(4)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (120, 400, 90)]
    given = {"policy": "snapkv", "budget": 128, "mode": "exact", "decode_budget": 64, "every": 64}
    written = written_by_two_ranks(tmp_path, environment, prompts, given, 240)
    reference = Reference(model, Settings(**given))
    for prompt, tokens in zip(prompts, written, strict=True):
        length = len(prompt)
        kept = torch.full((3, 4), 128 if length == 400 else 0)
        choices = tuple(range(length + 128, length + 239, 64))
        compression = Compression(length, 1, kept, choices=choices)
        assert reference.choices(prompt, tokens, [compression]) == tokens


@pytest.mark.skipif(is_on_cuda(), reason="on a GPU all tests have the runner they ask for")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install triton==3.9.0")
@pytest.mark.parametrize(
    ("runs_ahead", "caches", "when"),
    [
        *product([False, True], [False, True], ["always"]),
        (True, False, "pressure"),
        (True, True, "pressure"),
    ],
)
def test_second_model_runner_writes_what_transformers_writes(
    tmp_path: Path, environment: dict[str, str], runs_ahead: bool, caches: bool, when: str
):
    """Also with a prefix cache, in which half of the prompts have the same beginning."""
    model, rng = save_llama(tmp_path / "model"), random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(60, 300))] for _ in range(6)]
    if caches:
        prompts[3:] = [prompts[0][:100] + prompt[:100] for prompt in prompts[3:]]
    counts = [rng.randint(100, 160) for _ in prompts]
    arguments = [model, *map(json.dumps, (prompts, counts, runs_ahead, caches, when))]
    done = subprocess.run(
        [sys.executable, vllm_second_runner.__file__, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = done.stdout.split(vllm_second_runner.MARK)[1]
    all_tokens, compressions, preemptions, cached = json.loads(result)
    assert (preemptions > 0 or when == "pressure") and any(cached) == caches
    assert any(at for found in compressions for _, _, _, at in found) == (when == "pressure")
    reference = Reference(model, Settings(budget=64))
    for prompt, tokens, found in zip(prompts, all_tokens, compressions, strict=True):
        compressed = [Compression(b, n, torch.tensor(lengths), at) for b, n, lengths, at in found]
        known = comparable(prompt, tokens, compressed)
        assert reference.choices(prompt, known, compressed) == known
