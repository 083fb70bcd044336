"""Runs the C++ runtime and transformers on the same prompt and compares what they keep and write.

python examples/embed_cpp/compare.py EMBED FOLDER [--ratio 0.1] [--policy ada_snapkv]
                                                  [--device cuda]

EMBED is the executable, FOLDER what export.py wrote, the device that of the executable's cache;
Python stays on the CPU. The exit code says whether all is the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

POLICIES = ("ada_snapkv", "critical_ada_snapkv")


def in_cpp(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    command = [args.embed, args.folder, args.folder / "tokens.txt", "--ratio", str(args.ratio)]
    command += ["--new-tokens", str(args.new_tokens), "--threads", str(args.threads), "--json", out]
    command += ["--device", args.device]
    if args.policy == "critical_ada_snapkv":
        command.append("--critical")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def in_python(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """In a process of its own, so that its peak memory can be told."""
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--python-to", out], check=True)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def run_python(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    import adakv

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    prompt = [int(token) for token in (args.folder / "tokens.txt").read_text().split()]
    tokens = torch.tensor([prompt])
    written: list[int] = []
    with torch.inference_mode(), adakv.attach(model):
        cache = adakv.Cache(model, args.policy, ratio=args.ratio)
        start = time.perf_counter()
        while len(written) < args.new_tokens:
            logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)
            written.append(int(tokens))
            if len(written) == 1:
                prefilled = time.perf_counter()
                kept = [[row.tolist() for row in cache.kept(i)[0]] for i in range(len(cache))]
                decoding = time.perf_counter()
        end = time.perf_counter()
    return {
        "tokens": written,
        "kept": kept,
        "prefill_s": prefilled - start,
        "ms_per_token": 1e3 * (end - decoding) / max(1, len(written) - 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("embed", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--policy", choices=POLICIES, default="ada_snapkv")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python-to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.python_to:
        args.python_to.write_text(json.dumps(run_python(args)))
        return

    with tempfile.TemporaryDirectory() as folder:
        cpp = in_cpp(args, Path(folder) / "cpp.json")
        python = in_python(args, Path(folder) / "python.json")
    rows = [(i, h) for i, layer in enumerate(cpp["kept"]) for h in range(len(layer))]
    same_rows = sum(cpp["kept"][i][h] == python["kept"][i][h] for i, h in rows)
    entries = sum(len(cpp["kept"][i][h]) for i, h in rows)
    missing = sum(len({*cpp["kept"][i][h]} - {*python["kept"][i][h]}) for i, h in rows)
    same_start = next(
        (i for i, (a, b) in enumerate(zip(cpp["tokens"], python["tokens"], strict=True)) if a != b),
        len(cpp["tokens"]),
    )
    print(f"{args.policy}, {args.ratio:.0%} of {args.folder / 'tokens.txt'}, {args.device}")
    print(f"kept sets: {same_rows} of {len(rows)} the same; {missing} of {entries} entries differ")
    print(f"tokens: the first {same_start} of {len(cpp['tokens'])} the same")
    for name, result in (("C++", cpp), ("Python", python)):
        print(
            f"{name:8} prefill {result['prefill_s']:6.2f} s   a token "
            f"{result['ms_per_token']:6.1f} ms   peak {result['peak_bytes'] / 2**20:7.1f} MiB"
        )
    if args.device == "cpu":
        least = sum(cpp[f"{part}_bytes"] for part in ("weight", "cache", "layer"))
        print(f"C++ peak: {cpp['peak_bytes'] / least:.3f} x (weights + kept cache + one layer)")
    sys.exit(missing > 0 or same_start < len(cpp["tokens"]))


if __name__ == "__main__":
    main()
