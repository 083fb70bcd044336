"""Adapters: what plugs adakv into a framework that runs models. Loaded when first used."""

from adakv.models.batch import (
    BatchOptions,
    BatchResult,
    NewToken,
    generate_batch,
    generate_stream,
)
from adakv.models.hf import Attachment, Cache, attach
from adakv.models.loop import cuda_graph_sample

__all__ = [
    "Attachment",
    "BatchOptions",
    "BatchResult",
    "Cache",
    "NewToken",
    "attach",
    "cuda_graph_sample",
    "generate_batch",
    "generate_stream",
]
