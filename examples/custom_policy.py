"""A scorer of one's own, in a policy with parts of the library."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from adakv.policy import Adaptive, LayerInputs, Policy, TopScore, WindowAttention


@dataclass(frozen=True)
class ValueAware:
    """Attention times the size of the value (VATP, arXiv 2406.12335).

    ``S[h, t] = attention[h, t] * |v[h, t]|_1``; the first entries, whose values are small, stay.
    """

    attention: WindowAttention = field(default_factory=lambda: WindowAttention(pinned=4))

    @property
    def window(self) -> int:
        return self.attention.window

    @property
    def pinned(self) -> int:
        return self.attention.pinned

    def score(self, inputs: LayerInputs) -> Tensor:
        sizes = inputs.values.float().abs().sum(-1)  # [B, Hkv, T]
        return self.attention.score(inputs) * sizes


if __name__ == "__main__":
    policy = Policy(ValueAware(), Adaptive(floor=0.2), TopScore())
    torch.manual_seed(0)
    keys = torch.randn(1, 4, 1000, 64) + torch.tensor([0.0, 0.1, 0.3, 1.0]).view(4, 1, 1)
    queries = torch.randn(1, 16, policy.window, 64)
    values = torch.randn(1, 4, 1000, 64)
    inputs = LayerInputs(queries, keys, values, None, (1000,), layer=0, num_layers=1)
    kept = policy.choose(inputs, budget=128)
    for head, count in enumerate(kept.indptr.diff().tolist()):
        print(f"kv head {head} keeps {count:3} of 1000 entries")
    # With a model: adakv.Cache(model, policy=policy, budget=128)
