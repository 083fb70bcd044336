"""Adapters: what plugs adakv into a framework that runs models. Loaded when first used."""

from adakv.hf.attachment import Attachment, attach, detach
from adakv.hf.cache import Cache
from adakv.hf.cuda_graph import cuda_graph_sample
from adakv.hf.drafts import DraftModel
from adakv.hf.generate import (
    BatchOptions,
    BatchResult,
    NewToken,
    generate_batch,
    generate_stream,
)
from adakv.hf.looking import match_layers
from adakv.hf.token_classes import classes_of
from adakv.hf.workers import generate_on

__all__ = [
    "Attachment",
    "BatchOptions",
    "BatchResult",
    "Cache",
    "DraftModel",
    "NewToken",
    "attach",
    "classes_of",
    "cuda_graph_sample",
    "detach",
    "generate_batch",
    "generate_on",
    "generate_stream",
    "match_layers",
]
