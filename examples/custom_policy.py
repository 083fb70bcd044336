"""A scorer of one's own, in a policy with parts of the library."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv.policy import Adaptive, LayerInputs, Policy, TopScore


@dataclass(frozen=True)
class KeyDiff:
    """Keys that are unlike the others (KeyDiff, arXiv 2504.15364).

    ``S[h, t] = -cos(k[h, t], mean over t of k[h, t] / |k[h, t]|)``; needs no attention.
    """

    window: int = 32
    sinks: int = 0

    def score(self, inputs: LayerInputs) -> Tensor:
        keys = F.normalize(inputs.keys.float(), dim=-1)  # [B, Hkv, T, D]
        if inputs.seq_lens is not None:
            position = torch.arange(inputs.length, device=keys.device)
            padding = position >= inputs.seq_lens[:, None]  # [B, T]
            keys = keys.masked_fill(padding[:, None, :, None], 0)
        return -F.cosine_similarity(keys, keys.mean(2, keepdim=True), dim=-1)


if __name__ == "__main__":
    policy = Policy(KeyDiff(), Adaptive(floor=0.2), TopScore())
    torch.manual_seed(0)
    keys = torch.randn(1, 4, 1000, 64) + torch.tensor([0.0, 0.1, 0.3, 1.0]).view(4, 1, 1)
    queries = torch.randn(1, 16, policy.window, 64)
    inputs = LayerInputs(queries, keys, keys, None, (1000,), layer=0, num_layers=1)
    kept = policy.choose(inputs, budget=128)
    for head, count in enumerate(kept.indptr.diff().tolist()):
        print(f"kv head {head} keeps {count:3} of 1000 entries")
    # With a model: adakv.Cache(model, policy=policy, budget=128)
