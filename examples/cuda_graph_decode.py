"""Generation with the decode step in a CUDA graph: one argument more to transformers' generate.

    python examples/cuda_graph_decode.py MODEL FILE

MODEL is a folder or a name on the Hugging Face hub, FILE a long text.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import adakv

name, file = sys.argv[1:3]
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device).eval()
inputs = tokenizer(Path(file).read_text(), return_tensors="pt").to(device)

for options in ({}, {"custom_generate": adakv.cuda_graph_sample}):
    with adakv.attach(model):
        cache = adakv.Cache(model, policy="ada_snapkv", ratio=0.1)
        start = time.perf_counter()
        tokens = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=128, do_sample=False, **options
        )
        seconds = time.perf_counter() - start
    print(f"{seconds:.2f} s", tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]))
