"""What compression does, on the OpenAI server's ``/metrics``.

Entry point ``vllm.stat_logger_plugins``, loaded in the server's process; the engine's counts come
out of its ledger.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from adakv.vllm.admission import set_limits
from adakv.vllm.config import Settings
from adakv.vllm.ledger import Counts, ledger_name, read_counts, remove_at_exit

_logger = logging.getLogger("adakv")

_HELP = {
    "requests_compressed": "Requests whose prompts were compressed.",
    "blocks_given_back": "Blocks that compressed requests gave back before their end.",
    "entries_read": "Entries of compressed prompts, over the layers and kv heads of one rank.",
    "entries_kept": "Entries that were kept of them.",
    "compressed_under_pressure": "Requests compressed because blocks ran short.",
    "preemptions_avoided": "Those of them that ran short beside running requests: vLLM would have "
    "preempted one.",
    "prefix_tokens_found": "Tokens of prompts that were found in the prefix cache.",
    "texts_compressed": "Times that a text was cut down while it was written.",
}


class CompressionLogger(StatLoggerBase):
    """Counters ``adakv:<name>_total`` of one engine, read when somebody asks for them."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._index = str(engine_index)
        self._name = ledger_name(vllm_config, engine_index)
        settings = Settings.of(vllm_config.additional_config)
        self._is_used = settings is not None
        if settings is not None:
            set_limits(settings.limits)
            prometheus_client.REGISTRY.register(self)
            remove_at_exit(self._name)  # this process outlives the engine

    @property
    def counts(self) -> Counts:
        """Since the engine started."""
        return read_counts(self._name)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Called by prometheus_client."""
        for name, count in self.counts._asdict().items():
            family = CounterMetricFamily(f"adakv:{name}", _HELP[name], labels=["engine"])
            family.add_metric([self._index], count)
            yield family

    def describe(self) -> list[CounterMetricFamily]:
        """Called by prometheus_client; nothing that has to be read out for it."""
        return []

    def record(self, *args: Any, **kwargs: Any) -> None:
        """The engine's own statistics: not needed."""

    def log(self) -> None:
        """A line now and then, where vLLM has its own."""
        if self._is_used:
            _logger.info("engine %s: %s", self._index, self.counts)

    def log_engine_initialized(self) -> None:
        """Nothing yet."""
