"""A server: one model, several clients at once, each answer sent while it is written.

pip install fastapi uvicorn, and run:   python examples/serve_fastapi.py MODEL
Then ask:   curl -N localhost:8000/generate --json '{"prompt": "Once upon a time"}'
"""

import sys
import threading
from collections.abc import Iterator
from itertools import chain
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

import adakv


class Request(BaseModel):
    """What a client sends."""

    prompt: str
    max_new_tokens: int = 128


def make_app(model: Any, tokenizer: Any, *, ratio: float = 0.1, at_once: int = 4) -> FastAPI:
    """Keeps ``ratio`` of each prompt; so many are read and written at once, the others wait."""
    app = FastAPI()
    room = threading.BoundedSemaphore(at_once)
    # Two threads can't record CUDA graphs at the same time.
    options = adakv.BatchOptions(cuda_graph=False)

    def write(request: Request) -> Iterator[str]:
        with room:
            stream = adakv.generate_stream(
                model,
                [request.prompt],
                ratio=ratio,
                max_new_tokens=request.max_new_tokens,
                tokenizer=tokenizer,
                options=options,
            )
            tokens, sent = [], ""
            for new in stream:
                tokens.append(new.token)
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                if new.result is not None or not text.endswith("\ufffd"):  # half a character
                    yield text[len(sent) :]
                    sent = text

    @app.post("/generate")
    def generate(request: Request) -> StreamingResponse:  # in a thread of its own
        pieces = write(request)
        try:
            first = next(pieces)  # before the answer begins, so that errors have a status
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        except adakv.Error as error:
            raise HTTPException(503, str(error)) from error
        return StreamingResponse(chain([first], pieces), media_type="text/plain")

    return app


if __name__ == "__main__":
    import uvicorn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    uvicorn.run(make_app(model, AutoTokenizer.from_pretrained(name)), port=8000)
