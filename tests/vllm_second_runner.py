"""A program: an engine with vLLM's second model runner, which is the one for GPUs, on the CPU.

Its kernels are Triton's, which has an interpreter for them, but no backend for the CPU: vLLM is
told of one. Takes a folder with a model, and prompts, numbers of new tokens, whether the engine
runs ahead, whether it caches prefixes, and when it compresses, as JSON; writes what came of them
as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

ENVIRONMENT = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
MARK = "RESULT "


class Driver:
    """What vLLM asks of a driver of Triton's."""

    @staticmethod
    def is_active() -> bool:
        return True


def main() -> None:
    """Runs the requests."""
    os.environ.update(ENVIRONMENT)
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=Driver, compiler=None)

    from adakv.vllm.config import Settings
    from vllm_engine import SMALL, engine

    model, prompts, counts, runs_ahead, caches, when = sys.argv[1], *map(json.loads, sys.argv[2:])
    small = SMALL | {"num_gpu_blocks_override": 21, "enable_prefix_caching": caches}
    with engine(model, Settings(budget=64, when=when), runs_ahead=runs_ahead, **small) as it:
        runner = it.core.model_executor.driver_worker.worker.model_runner
        assert type(runner).__module__ == "vllm.v1.worker.cpu.model_runner"
        run = it.run(prompts, counts)
        assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
    compressions = [
        [(c.boundary, c.num_outputs, c.lengths.tolist(), c.at) for c in of_request]
        for of_request in run.compressions
    ]
    sys.stdout.write(MARK + json.dumps([run.tokens, compressions, run.preemptions, run.cached]))


if __name__ == "__main__":
    main()
