"""vLLM's OpenAI server with compressed caches, and a client that reads it as it writes.

pip install 'adakv[vllm]' and run:  python examples/vllm_serve.py MODEL book.txt "Who did it?"
"""

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

from openai import OpenAI

ADDRESS = "http://127.0.0.1:8011"
COMPRESSION = {"adakv": {"policy": "ada_snapkv", "budget": 512}}


def start(model: str) -> subprocess.Popen[bytes]:
    """The server, once it answers."""
    command = ["vllm", "serve", model, "--port", "8011", "--block-size", "32"]
    command += ["--additional-config", json.dumps(COMPRESSION)]
    if shutil.which("nvidia-smi"):
        command += ["--attention-backend", "CUSTOM"]
    server = subprocess.Popen(command)
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{ADDRESS}/health", timeout=5)
            return server
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    sys.exit("the server has ended")


def main() -> None:
    """One question about one text, and what the server counted."""
    model, path, question = sys.argv[1:4]
    with open(path, encoding="utf-8") as file:
        text = file.read()
    server = start(model)
    try:
        client = OpenAI(base_url=f"{ADDRESS}/v1", api_key="none")
        messages = [{"role": "user", "content": f"{text}\n\n{question}"}]
        answer = client.chat.completions.create(
            model=model, messages=messages, max_tokens=128, stream=True
        )
        for part in answer:
            print(part.choices[0].delta.content or "", end="", flush=True)
        metrics = urllib.request.urlopen(f"{ADDRESS}/metrics").read().decode()
        print("\n", *(x for x in metrics.splitlines() if x.startswith("adakv:")), sep="\n")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
