"""A program: an engine of two tensor-parallel ranks, processes of their own that talk over gloo.

Takes a folder with a model, and settings of adakv's, options of the engine, prompts and numbers of
new tokens as JSON; the options' "leave" are pairs of requests and steps before which they are
aborted; writes what came of them as JSON, the rows of both ranks side by side. With
``--killed`` the second rank is killed while it writes, and the error is written.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

import torch

from adakv.vllm.config import Settings
from vllm_engine import Engine, engine

MARK = "RESULT "


def held(worker: Any) -> tuple[int, torch.Tensor, torch.Tensor, int]:
    """What a rank knows: its process, boundaries, lengths ``[L, blocks, Hkv]``, and how many
    prompts it remembers."""
    builders = [
        g.get_metadata_builder() for groups in worker.model_runner.attn_groups for g in groups
    ]
    cache = next(builder.cache for builder in builders if getattr(builder, "cache", None))
    return os.getpid(), cache.boundaries, cache.lengths, len(cache.prompts)


class Ranks(Engine):
    """An engine whose workers can be looked at from outside."""

    @property
    def cache(self) -> Any:
        """Both ranks' halves as one."""
        pids, boundaries, lengths, counts = zip(
            *self.core.model_executor.collective_rpc(held), strict=True
        )
        boundaries = [x.cpu() for x in boundaries]  # of GPUs of their own
        assert torch.equal(*boundaries)
        both = torch.cat([x.cpu() for x in lengths], -1)
        return SimpleNamespace(boundaries=boundaries[0], lengths=both, pids=pids, counts=counts)


def main() -> None:
    """Runs the requests."""
    model, settings, options, prompts, counts = sys.argv[1], *map(json.loads, sys.argv[2:6])
    leave = dict(options.pop("leave", ()))
    options |= {"tensor_parallel_size": 2}
    with engine(model, Settings(**settings), kind=Ranks, **options) as it:
        run = it.run(prompts, counts, leave=leave)
        assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
        it.run([[1] * 20], 2)  # a step in which what is gone is forgotten
        cache = it.cache
        assert max(cache.counts) <= 1
        compressions = [
            [(c.boundary, c.num_outputs, c.lengths.tolist(), c.at) for c in of_request]
            for of_request in run.compressions
        ]
        counted = it.manager._ledger.counts._asdict()
        result = [run.tokens, compressions, run.preemptions, run.cached, counted]
        if "--killed" in sys.argv:
            os.kill(cache.pids[1], signal.SIGKILL)
            try:
                it.run(prompts, counts)
                result = ["nothing happened"]
            except Exception as error:
                result = [f"{type(error).__name__}: {error}"]
        sys.stdout.write(MARK + json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
