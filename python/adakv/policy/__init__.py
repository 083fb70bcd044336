"""Policies: which entries of a prompt stay in the cache.

A policy is a scorer, an allocator and a selector; :func:`get` knows those that have a name.
"""

from adakv.policy.allocators import Adaptive, Everything, Flat, ModelWide, Pyramid, Uniform
from adakv.policy.base import (
    Allocator,
    Kept,
    LayerInputs,
    LayerSchedule,
    Policy,
    Scorer,
    Selector,
)
from adakv.policy.presets import get, names
from adakv.policy.scorers import KeyNorm, Random, Recency, WindowAttention
from adakv.policy.selectors import TopScore, TwoStage

__all__ = [
    "Adaptive",
    "Allocator",
    "Everything",
    "Flat",
    "Kept",
    "KeyNorm",
    "LayerInputs",
    "LayerSchedule",
    "ModelWide",
    "Policy",
    "Pyramid",
    "Random",
    "Recency",
    "Scorer",
    "Selector",
    "TopScore",
    "TwoStage",
    "Uniform",
    "WindowAttention",
    "get",
    "names",
]
