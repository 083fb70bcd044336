"""Questions about texts of Python's manual, all at once: one cache, a fifth of each text.

python examples/batch_generate.py MODEL        a folder or a hub name
"""

import sys
from pydoc_data.topics import topics  # the language reference, which Python carries with it

from transformers import AutoModelForCausalLM, AutoTokenizer

import adakv

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name).eval()

names = ("for", "global", "with", "dict", "raise", "class")
prompts = []
for topic in names:
    message = {"role": "user", "content": f"{topics[topic]}\n\nSum this up in one sentence."}
    ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)
    prompts.append(ids["input_ids"])

stream = adakv.generate_stream(
    model,
    prompts,
    ratio=0.2,
    max_new_tokens=40,
    tokenizer=tokenizer,
    options=adakv.BatchOptions(max_batch=4),  # the others wait until a slot is free
)
for new in stream:
    if new.result is not None:  # the last token of a text
        done = new.result
        print(f"{names[done.index]}: {done.prompt_tokens} tokens, ended by {done.end}")
        print(f"  {done.text.strip()}\n")
