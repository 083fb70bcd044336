"""The policies that have a name: rows of one table.

A name with ``@`` is a method with the settings of other people's code (FFY0/AdaKV, NVIDIA/kvpress,
Zefan-Cai/KVCache-Factory), to reproduce its numbers; docs/policies.md says where they still differ.
"""

from __future__ import annotations

from adakv.errors import short
from adakv.policy.allocators import Adaptive, Capped, Everything, ModelWide, Pyramid, Uniform
from adakv.policy.base import Policy, TopScore
from adakv.policy.class_scorers import ClassAttention, ClassQuotas, DualThreshold, EliteQueries
from adakv.policy.expression import parse, parse_read
from adakv.policy.fusion import RankFusion
from adakv.policy.inputs import did_you_mean
from adakv.policy.layer_shares import LayerEntropy, StrengthSkew
from adakv.policy.mass_share import MassShare
from adakv.policy.more_tokens import MoreTokens
from adakv.policy.prompt_scorers import (
    ColumnMax,
    ExpectedAttention,
    PromptAttention,
    RepeatAttention,
)
from adakv.policy.reads import Read
from adakv.policy.scorers import (
    Defensive,
    KeyDiff,
    KeyNorm,
    LargestValue,
    LastQuery,
    Random,
    Recency,
    WindowAttention,
)
from adakv.policy.selectors import TwoStage
from adakv.policy.text_scorers import (
    RKV,
    AhaKV,
    Earliest,
    LastImportant,
    SampledRest,
    ValueRange,
)

_snapkv = WindowAttention()
_wide_column_max = ColumnMax(weigh_by="all", window_weight=4)
_citrus = RepeatAttention(window=32, pinned=0, reduce="mean", all_heads=True)
_prefixkv = PromptAttention(window=1, pinned=4, all_heads=True)
_adaptive_pyramid = Adaptive(layers=Pyramid())

_mikv = MoreTokens("auto:1/5 + int4:4/5")
_think = MoreTokens("channels=3/5")

_ffy0_pyramid = Pyramid(rounding="official")
_ffy0_adaptive = Adaptive(safeguard="official_round")
_ffy0_adaptive_pyramid = Adaptive(safeguard="official_round", layers=_ffy0_pyramid)

_kvpress = WindowAttention(window=64, order="pool_first", pool="avg", pool_width=5)
_kvpress_adaptive = Adaptive(safeguard="hard_floor", counts_window=True)
_kvpress_stages = TwoStage(counts_window=True)

_factory = WindowAttention(window=8)
_factory_pyramid = Pyramid(rounding="official", short_prompts="flat")
_factory_adaptive = Adaptive(safeguard="official_round", weigh_heads=True)

# fmt: off
_PRESETS: dict[str, Policy] = {
    "streaming":                   Policy(Recency(pinned=4), Uniform(), TopScore()),
    "random":                      Policy(Random(), Uniform(), TopScore()),
    "snapkv":                      Policy(_snapkv, Uniform(), TopScore()),
    "pyramidkv":                   Policy(_snapkv, Uniform(Pyramid()), TopScore()),
    "ada_snapkv":                  Policy(_snapkv, Adaptive(), TopScore()),
    "ada_pyramidkv":               Policy(_snapkv, _adaptive_pyramid, TopScore()),
    "critical_snapkv":             Policy(_snapkv, Uniform(), TwoStage()),
    "critical_ada_snapkv":         Policy(_snapkv, Adaptive(), TwoStage()),
    "critical_ada_pyramidkv":      Policy(_snapkv, _adaptive_pyramid, TwoStage()),
    "defensive":                   Policy(Defensive(), Adaptive(), TopScore()),
    "layer_defensive":             Policy(Defensive(norm_share="entries"), ModelWide(), TopScore()),
    "ada_column_max":              Policy(ColumnMax(), Adaptive(), TopScore()),
    "model_column_max":            Policy(_wide_column_max, ModelWide(reserve=2), TopScore()),
    "model_rank_fusion":           Policy(RankFusion(), ModelWide(reserve=2), TopScore()),
    "kvzip":                       Policy(RepeatAttention(), ModelWide(), TopScore()),
    "expected":                    Policy(ExpectedAttention(), Uniform(), TopScore()),
    "ada_expected":                Policy(ExpectedAttention(), Adaptive(), TopScore()),
    "keydiff":                     Policy(KeyDiff(), Uniform(), TopScore()),
    "knorm":                       Policy(KeyNorm(), Uniform(), TopScore()),
    "tova":                        Policy(LastQuery(), Uniform(), TopScore()),
    "h2o":                         Policy(PromptAttention(), Uniform(), TopScore()),
    "r_kv":                        Policy(RKV(), Uniform(), TopScore()),
    "vase":                        Policy(ValueRange(), Uniform(), SampledRest()),
    "ahakv":                       Policy(AhaKV(), Uniform(), TopScore()),
    "corm":                        Policy(LastImportant(), Capped(), TopScore()),
    "prefixkv":                    Policy(_prefixkv, MassShare(), TopScore()),
    "prefixkv_heads":              Policy(PromptAttention(), MassShare(of_heads=True), TopScore()),
    "prefixkv_text":               Policy(Earliest(), Uniform(), TopScore()),
    "lava":                        Policy(LargestValue(), LayerEntropy(), TopScore()),
    "critical_lava":               Policy(LargestValue(), LayerEntropy(), TwoStage()),
    "aircache":                    Policy(EliteQueries(), StrengthSkew(), TopScore()),
    "csp":                         Policy(ClassAttention(), Uniform(), ClassQuotas()),
    "hae":                         Policy(DualThreshold(), Capped(floor=1.0), TopScore()),
    "citrus":                      Policy(_citrus, Uniform(), TopScore()),
    "more_tokens":                 Policy(_snapkv, Uniform(), TopScore(), bits=MoreTokens()),
    "mikv":                        Policy(PromptAttention(), Uniform(), TopScore(), bits=_mikv),
    "think":                       Policy(_snapkv, Uniform(), TopScore(), bits=_think),
    "full":                        Policy(Recency(pinned=0), Uniform(Everything()), TopScore()),
    "pyramidkv@ffy0":              Policy(_snapkv, Uniform(_ffy0_pyramid), TopScore()),
    "ada_snapkv@ffy0":             Policy(_snapkv, _ffy0_adaptive, TopScore()),
    "ada_pyramidkv@ffy0":          Policy(_snapkv, _ffy0_adaptive_pyramid, TopScore()),
    "snapkv@kvpress":              Policy(_kvpress, Uniform(), TopScore()),
    "ada_snapkv@kvpress":          Policy(_kvpress, _kvpress_adaptive, TopScore()),
    "critical_snapkv@kvpress":     Policy(_kvpress, Uniform(), _kvpress_stages),
    "critical_ada_snapkv@kvpress": Policy(_kvpress, _kvpress_adaptive, _kvpress_stages),
    "snapkv@kvcache_factory":      Policy(_factory, Uniform(), TopScore()),
    "pyramidkv@kvcache_factory":   Policy(_factory, Uniform(_factory_pyramid), TopScore()),
    "ada_snapkv@kvcache_factory":  Policy(_factory, _factory_adaptive, TopScore()),
}
# fmt: on


#: The best all-rounder of what reads a prompt once: docs/quality.md.
DEFAULT = "model_rank_fusion"


def names() -> tuple[str, ...]:
    """Names of the presets."""
    return tuple(_PRESETS)


def name_of(policy: Policy) -> str:
    """The name of a preset that is this policy, or else its parts, written down."""
    return next((name for name, preset in _PRESETS.items() if preset == policy), str(policy))


def get(policy: str | Policy) -> Policy:
    """The preset of that name, or the policy that a text like ``"KeyDiff() * Adaptive(floor=0.1) *
    TopScore()"`` describes; a :class:`Policy` is given back as it is."""
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str) and "(" in policy:
        return parse(policy)
    if not isinstance(policy, str) or policy not in _PRESETS:
        raise ValueError(
            f"policy must be one of {', '.join(names())}, scorer * allocator * selector written "
            f"down, or a Policy; got {short(policy)}{did_you_mean(policy, names())}"
        )
    return _PRESETS[policy]


def get_read(read: str | Read) -> Read:
    """What a text like ``"Quest(share=0.25)"`` describes; a :class:`Read` is given back as it
    is."""
    if isinstance(read, Read):
        return read
    if not isinstance(read, str):
        raise ValueError(f"read must be a Quest, or one written down, got {short(read)}")
    return parse_read(read)


def read_by(policy: Policy, read: str | Read | None) -> Read | None:
    """:func:`get_read` of what steps of a policy's caches read; None if they read everything.

    Raises ``ValueError`` if its entries have biases, as pages are chosen by their keys alone.
    """
    if read is not None and policy.has_biases:
        raise ValueError(
            "read: it chooses pages by their keys alone, and Folded() gives entries biases; take "
            "Folded(biases=False), or read everything"
        )
    return None if read is None else get_read(read)
