"""What a user asks for in ``additional_config={"adakv": {...}}``, and what can't be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from adakv.policy import (
    Adaptive,
    Capped,
    Everything,
    Flat,
    PartwiseScorer,
    Policy,
    Pyramid,
    WholePages,
    get,
)
from adakv.reselection import Rule
from adakv.vllm.pages import spans_layers
from adakv.vllm.ranks import Across, AllRanks, can_cross
from adakv.vllm.requests import Limits

Mode = Literal["fill", "exact"]
When = Literal["always", "pressure"]
Format = Literal["auto", "int8", "fp8", "int4"]
Budgets = Literal["rank", "all_ranks"]

_CHOICES = {
    "mode": get_args(Mode),
    "when": get_args(When),
    "kv_dtype": get_args(Format),
    "budgets": get_args(Budgets),
}

#: Versions of vLLM whose hooks this plugin knows: at least the first, below the second.
SUPPORTED_VERSIONS = ((0, 32), (0, 34))


@dataclass(frozen=True)
class Settings:
    """One engine's settings.

    Parameters
    ----------
    policy : str
        One of :func:`adakv.policies` that chooses after one pass over the prompt, a number of
        entries that is known beforehand.
    budget : int
        Mean entries to keep per kv head of each prompt, the policy's window included.
    mode : "fill" or "exact"
        Whether each head also keeps what its last page has room for, or exactly its budget.
    when : "always" or "pressure"
        Whether each prompt is compressed when it has been read, or requests only when blocks run
        short.
    kv_dtype : "auto", "int8", "fp8" or "int4"
        What blocks hold: keys and values as the model has them, or codes of them (docs/bits.md).
    decode_budget : int, optional
        Mean entries to keep per kv head of what a request writes (docs/texts.md), beside what is
        kept of its prompt. Default: all of it.
    decode_policy : str, optional
        What chooses them. Default: ``policy``.
    every : int, optional
        Tokens from one choice to the next, at least two blocks. Default: 128, or what the policy
        says.
    budgets : "rank" or "all_ranks"
        Whether each tensor-parallel rank shares a layer's budget out among its own kv heads, or all
        do among those of all ranks.

    Raises
    ------
    ValueError
        Names the setting, what is expected and what came.
    """

    policy: str = "ada_snapkv"
    budget: int = 1024
    mode: Mode = "fill"
    when: When = "always"
    kv_dtype: Format = "auto"
    decode_budget: int | None = None
    decode_policy: str | None = None
    every: int | None = None
    budgets: Budgets = "rank"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                given = getattr(self, name)
                raise ValueError(f"adakv: {name} must be one of {choices}, got {given!r}")
        if not isinstance(self.budget, int) or isinstance(self.budget, bool):
            raise ValueError(f"adakv: budget must be an integer, got {self.budget!r}")
        if reason := why_not(self.preset):
            raise ValueError(f"adakv: policy {self.policy!r} can't run inside vLLM: {reason}")
        if self.budgets == "all_ranks" and not can_cross(self.preset.allocator):
            raise ValueError(
                'adakv: budgets can be "all_ranks" of policies that share the same budget for each '
                "layer out among its kv heads by their scores alone, as ada_snapkv does, got "
                f"policy {self.policy!r}"
            )
        if self.budget < self.limits.least:
            raise ValueError(
                f"adakv: budget must be at least {self.limits.least} entries per kv head (window "
                f"{self.preset.window}, pinned {self.preset.scorer.pinned}), got {self.budget}"
            )
        if (rule := self.rule) is not None and (reason := why_not_again(rule)):
            name = self.decode_policy or self.policy
            raise ValueError(f"adakv: decode_policy {name!r} can't run inside vLLM: {reason}")
        if rule is not None and self.kv_dtype == "int4":
            raise ValueError(
                "adakv: decode_budget must not be given with blocks of int4, which are not chosen "
                f"from while a text is written, got {self.decode_budget}"
            )

    @classmethod
    def of(cls, additional_config: object) -> Settings | None:
        """Reads vLLM's ``additional_config``; None if it has no entry ``adakv``."""
        if not isinstance(additional_config, Mapping) or "adakv" not in additional_config:
            return None
        given = additional_config["adakv"]
        names = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or set(given) - set(names):
            raise ValueError(
                f'additional_config["adakv"] must be a dict of {", ".join(names)}, got {given!r}'
            )
        return cls(**given)

    @cached_property
    def preset(self) -> Policy:
        """The policy of that name."""
        return get(self.policy)

    @cached_property
    def rule(self) -> Rule | None:
        """How texts are chosen from while they are written; None: they are not."""
        given = self.decode_policy, self.decode_budget, self.every
        try:
            return Rule.given(self.preset, *given, pin_prompt=True)
        except ValueError as error:
            raise ValueError(f"adakv: {error}") from None

    @property
    def limits(self) -> Limits:
        """What single requests may ask for."""
        scorer = self.preset.scorer
        protects = self.preset.is_model_wide or isinstance(self.preset.allocator.layers, Flat)
        least, reads_classes = scorer.window + scorer.pinned, "classes" in self.preset.needs
        return Limits(self.budget, least, protects, reads_classes)

    @property
    def window(self) -> int | None:
        """Last tokens of a prompt whose queries the policy hears; None: it hears all."""
        return None if "all_queries" in self.preset.needs else self.preset.window

    def crosses(self, num_ranks: int) -> bool:
        """Whether budgets cross so many tensor-parallel ranks."""
        return self.budgets == "all_ranks" and num_ranks > 1

    def check_ranks(self, config: Any) -> None:
        """Raises ``ValueError`` if budgets can't cross the ranks of a ``VllmConfig``."""
        ranks = config.parallel_config.tensor_parallel_size
        if self.crosses(ranks) and ranks > (heads := config.model_config.get_total_num_kv_heads()):
            raise ValueError(
                'adakv: budgets must be "rank" where ranks share kv heads, got "all_ranks" with '
                f"{ranks} ranks and {heads} kv heads"
            )

    def policy_for(self, block_size: int, across: Across | None = None) -> Policy:
        """The policy, with its budgets rounded up to pages of ``block_size`` in mode "fill", of
        this rank or ``across`` all ranks."""
        allocator = self.preset.allocator
        if across is not None:
            assert isinstance(allocator, Adaptive)
            allocator = AllRanks(allocator, block_size, across)
        if self.mode == "fill":
            allocator = WholePages(allocator, block_size)
        return replace(self.preset, allocator=allocator)


def why_not(policy: Policy) -> str | None:
    """Why a policy can't be used in an engine; None if it can.

    The scheduler gives blocks back without asking the workers. So what all layers keep in sum must
    follow from the prompt's length.
    """
    allocator = policy.allocator
    layers = allocator.layers
    if policy.bits is not None:
        return "its budget is one of bytes, and an engine's blocks hold entries as the model does"
    if policy.fold is not None:
        return "Folded() changes values and adds biases, which an engine's blocks don't hold"
    if "repeat" in policy.needs:
        return "it reads the prompt twice"
    if getattr(policy.scorer, "evicts", None) is not None:
        return "it evicts of images alone, so that prompts with other tokens may have no room"
    if "hidden" in policy.needs:
        return "it needs hidden states, which an engine's attention isn't given"
    if isinstance(layers, Everything):
        return "it keeps everything, which vLLM does without it"
    if isinstance(layers, Pyramid) and layers.rounding == "official":
        return "its rounding drifts, so that layers keep more than the budget in sum"
    if isinstance(allocator, Adaptive) and allocator.safeguard == "official_round":
        return "its rounding drifts, so how much a layer keeps isn't fixed"
    if isinstance(allocator, Capped):
        return "its budget is the most that stays, so how much a layer keeps isn't fixed"
    if "all_queries" in policy.needs and not isinstance(policy.scorer, PartwiseScorer):
        return "it needs all queries of a prompt at once, more memory than what it gives back"
    return None


def why_not_again(rule: Rule) -> str | None:
    """Why a policy can't choose from the texts of an engine; None if it can."""
    if rule.carries:
        return "its scores are sums over all queries of a text, which an engine doesn't keep"
    if spans_layers(rule.policy):
        return "its layers keep unequally much, which they can't while a text is written"
    # The most that stays is enough here: new tokens have blocks of their own.
    return None if isinstance(rule.policy.allocator, Capped) else why_not(rule.policy)


def check_version(version: str) -> None:
    """Raises ``ImportError`` unless this plugin knows the hooks of that version of vLLM."""
    first, end = SUPPORTED_VERSIONS
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not first <= found < end:
        raise ImportError(
            f"adakv: vLLM must be at least {first[0]}.{first[1]} and below {end[0]}.{end[1]}, "
            f"got {version}; without adakv in it, set VLLM_PLUGINS to the plugins to load"
        )


def check_engine(config: Any) -> None:
    """Raises ``ValueError`` if compressed caches can't work under a ``VllmConfig``."""
    parallel, cache = config.parallel_config, config.cache_config
    size, drafts = cache.block_size, config.speculative_config
    refused = {
        "kv_transfer_config: KV connectors move whole blocks of every request": (
            config.kv_transfer_config is not None
        ),
        "decode_context_parallel_size must be 1": parallel.decode_context_parallel_size > 1,
        "prefill_context_parallel_size must be 1": (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "pipeline_parallel_size must be 1": parallel.pipeline_parallel_size > 1,
        "nnodes must be 1 for each engine: its processes tell each other by shared memory": (
            parallel.nnodes_within_dp > 1
        ),
        "Ray may put its processes, which tell each other by shared memory, on several nodes": (
            parallel.use_ray or parallel.data_parallel_backend == "ray"
        ),
        "enable_elastic_ep must be off: it warms up again while requests run": (
            parallel.enable_elastic_ep
        ),
        "ubatches (enable_dbo) split a step in two": parallel.use_ubatching,
        "drafts must come from n-grams, not from a model": (
            drafts is not None and "ngram" not in str(drafts.method)
        ),
        "the model has latent attention (MLA)": config.model_config.use_mla,
        "all layers of the model have sliding windows, which stay as they are": (
            cache.sliding_window is not None
        ),
        f"kv_cache_dtype must be that of the model, got {cache.cache_dtype}": (
            cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32")
        ),
        f"block_size must be a power of two from 8 to 256, got {size}": (
            size is not None and (not 8 <= size <= 256 or size & (size - 1) != 0)
        ),
        "scheduler_reserve_full_isl must be on": (
            not config.scheduler_config.scheduler_reserve_full_isl
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise ValueError(f"adakv can't compress this engine's caches: {reason}")
