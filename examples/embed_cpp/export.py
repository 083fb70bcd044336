"""Writes what the C++ runtime reads: config.json, model.safetensors in float32, token ids, and the
fingerprint of the weights, by which it knows a book that `adakv compress` made for them.

python examples/embed_cpp/export.py MODEL FOLDER [--num-tokens 4096] [--text FILE]

MODEL is a folder, a hub name or a GGUF file; the text is Python's own manual if none is given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from adakv.cli.inputs import load_model, manual_text
from adakv.hf.attachment import decoder_of
from adakv.hf.saving import fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-tokens", type=int, default=4096)
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()

    model, tokenizer = load_model(args.model, dtype=torch.float32, device=torch.device("cpu"))
    text = args.text.read_text() if args.text else manual_text(tokenizer, args.num_tokens + 64)
    tokens = tokenizer(text)["input_ids"][: args.num_tokens]
    if len(tokens) < args.num_tokens:
        parser.error(f"the text has {len(tokens)} tokens, --num-tokens asks for {args.num_tokens}")
    model.save_pretrained(args.folder, max_shard_size="100GB")
    tokenizer.save_pretrained(args.folder)
    (args.folder / "fingerprint.txt").write_text(fingerprint(decoder_of(model)))
    (args.folder / "tokens.txt").write_text(" ".join(map(str, tokens)) + "\n")
    print(f"{args.folder}: model.safetensors, config.json and {len(tokens)} tokens")


if __name__ == "__main__":
    main()
