"""Unpacks a GGUF file into a folder that transformers reads in a second instead of half a minute.

python examples/gguf_to_folder.py MODEL.gguf FOLDER        weights become bfloat16
"""

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

file, folder = Path(sys.argv[1]), sys.argv[2]
source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
# The file's metadata are read anew by each of the three, which takes most of the time: a
# configuration that is at hand saves one of them.
config = AutoConfig.from_pretrained(**source)
options = {"config": config, "dtype": torch.bfloat16}
if hasattr(transformers, "GgufConfig"):  # plain weights, since 5.22 not the default
    options["quantization_config"] = transformers.GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(**source, **options)
PreTrainedTokenizerFast.from_pretrained(**source).save_pretrained(folder)
for name in ("quantization_config", "_pre_quantization_dtype"):
    if hasattr(model.config, name):
        delattr(model.config, name)
model.save_pretrained(folder)
