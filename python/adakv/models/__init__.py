"""Adapters: what plugs adakv into a framework that runs models. Loaded when first used."""

from adakv.models.hf import Attachment, Cache, attach

__all__ = ["Attachment", "Cache", "attach"]
