"""A long text, a question, and a KV cache that keeps a tenth of it.

python examples/quickstart.py MODEL        a folder, a hub name or a GGUF file
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics  # the language reference, which Python carries with it

from transformers import AutoModelForCausalLM, AutoTokenizer

import adakv

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
source = {"pretrained_model_name_or_path": name}
if name.endswith(".gguf"):
    path = Path(name)
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
tokenizer = AutoTokenizer.from_pretrained(**source)
model = AutoModelForCausalLM.from_pretrained(**source).eval()

text = "\n".join(topics[topic] for topic in ("exceptions", "try", "with", "class", "function"))
message = {"role": "user", "content": f"{text}\n\nWhat does the with statement do?"}
inputs = tokenizer.apply_chat_template(
    [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
)

with adakv.attach(model):
    cache = adakv.Cache(model, ratio=0.1)
    tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=60, do_sample=False)

stats = cache.stats()
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"\n{stats['seen'][0]} tokens in {stats['bytes'] / 2**20:.1f} MiB", end="")
print(f" instead of {stats['full_bytes'] / 2**20:.1f} MiB")
print("entries per kv head, first layer:", stats["lengths"][0, 0].tolist())
