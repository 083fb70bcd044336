"""The server in examples/: several clients at once get what each would get alone."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import adakv

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/serve_fastapi.py"
PROMPTS = [word * 60 for word in ("A bell rang. ", "Nobody came. ", "Who was it? ")]

pytestmark = [
    pytest.mark.model,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fastapi's
]


@pytest.fixture
def served(model: str) -> tuple[Any, Any, Any]:
    """The tiny model, its tokenizer and a client of their server."""
    from fastapi.testclient import TestClient

    spec = importlib.util.spec_from_file_location("serve_fastapi", EXAMPLE)
    assert spec is not None and spec.loader is not None
    server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(server)
    tokenizer = AutoTokenizer.from_pretrained(model)
    served = AutoModelForCausalLM.from_pretrained(model).eval()
    return served, tokenizer, TestClient(server.make_app(served, tokenizer, at_once=2))


def test_clients_at_once_get_their_own_texts(served: tuple[Any, Any, Any]) -> None:
    model, tokenizer, client = served

    def ask(prompt: str) -> str:
        answer = client.post("/generate", json={"prompt": prompt, "max_new_tokens": 12})
        assert answer.status_code == 200
        return str(answer.text)

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        answers = list(threads.map(ask, PROMPTS))
    alone = adakv.generate_batch(model, PROMPTS, ratio=0.1, max_new_tokens=12, tokenizer=tokenizer)
    assert answers == [result.text for result in alone]


def test_a_wrong_request_is_refused_with_its_reason(served: tuple[Any, Any, Any]) -> None:
    _, _, client = served
    for wrong, word in (({"prompt": ""}, "empty"), ({"prompt": "a", "max_new_tokens": 0}, "max")):
        answer = client.post("/generate", json=wrong)
        assert answer.status_code == 400
        assert word in answer.json()["detail"]
    assert client.post("/generate", json={"prompt": PROMPTS[0]}).status_code == 200
