"""Sparse reads by what a trained network foretells of the next step's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv.policy.inputs import check_range
from adakv.policy.reads import PageRead
from adakv.policy.weights import Weights, read, set_file


@dataclass(frozen=True, kw_only=True)
class AttentionPredictor(PageRead):
    """The pages that the next step will look at most, foretold from what the last steps looked at
    (AttentionPredictor, arXiv 2502.04077).

    Of each q head and page the largest attention that an entry got is kept for the last
    ``history`` steps. Two convolutions over steps and pages, one network for all heads and layers,
    make one number of each page; a page counts as much as the most that a q head of the group
    foretells. The best are read, beside the ``first`` pages and the ``newest``.

    Parameters
    ----------
    file : str
        A safetensors file with ``conv1.weight`` ``[16, 1, 3, 3]``, ``conv1.bias`` ``[16]``,
        ``conv2.weight`` ``[32, 16, 3, 3]``, ``conv2.bias`` ``[32]``, ``conv3.weight`` ``[1, 32,
        1]`` and ``conv3.bias`` ``[1]``, the names and shapes of the authors' weights: 4,833
        parameters. ``examples/train_predictor.py`` trains one.
    share, least, full_layers
        As of :class:`Quest`. The ``first`` pages and the newest count, and ``least`` has room for
        them.
    newest : int
        Pages at the end of a row that are read always; the authors' 64 entries.
    first : int
        Pages at the beginning of a row that are read always; the authors' 64 entries.
    history : int
        Steps that are looked back upon. So many are read whole before anything is foretold.
    every : int
        Of the steps behind them every so many-th is read whole, so that pages that were left out
        are looked at again.

    Raises ``ValueError`` if the file is no such file.
    """

    file: str
    newest: int = 4
    first: int = 4
    history: int = 64
    every: int = 5
    reads: ClassVar[str] = "pages"

    def __post_init__(self) -> None:
        super().__post_init__()
        set_file(self)
        check_range("first", self.first, 0)
        check_range("least", self.least, self.first + self.newest)
        check_range("history", self.history, 1)
        check_range("every", self.every, 1)
        read(self.file, torch.device("cpu"), _network)

    def pages(self, history: Tensor, lengths: Tensor, *, page_size: int) -> tuple[Tensor, Tensor]:
        """Which pages of each row a step of one token reads: as :meth:`Quest.pages` gives them.

        Parameters
        ----------
        history : ``[B, Hkv, G, H, m]`` float32
            The largest attention of each page, step by step, the oldest first.
        lengths : ``[B, Hkv]`` int32
            Entries that each row holds.
        page_size : int
            P.
        """
        group, length = history.shape[2], history.shape[4]
        _, older, _ = self._older(lengths, page_size, 1)  # [B, Hkv, 1]
        network = read(self.file, history.device, _network)
        counts = (older - self.first).expand(-1, -1, group).flatten()
        middle = F.pad(history[..., self.first :], (0, max(self.first + 1 - length, 0)))
        foretold = network(middle.flatten(0, 2), counts)
        worth = foretold.view(*history.shape[:3], -1).amax(2)  # [B, Hkv, m - first]
        # Any number may be foretold: what matters is the order.
        order = worth.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        ranks = F.pad((length - order).float(), (self.first, 0), value=torch.inf)
        return self.best(ranks[..., :length], lengths, page_size=page_size)


class Network(NamedTuple):
    """Two convolutions over steps and pages, a mean over the steps, and one number of each page."""

    conv1: Tensor  # [16, 1, 3, 3]
    bias1: Tensor  # [16]
    conv2: Tensor  # [32, 16, 3, 3]
    bias2: Tensor  # [32]
    conv3: Tensor  # [1, 32, 1]
    bias3: Tensor  # [1]

    def __call__(self, history: Tensor, counts: Tensor) -> Tensor:
        """``[N, m]`` of histories ``[N, H, m]``, of which the first ``counts`` ``[N]`` pages are
        there: as if the others were not; ``-inf`` for them."""
        is_there = torch.arange(history.shape[2], device=history.device) < counts[:, None]
        mask = is_there[:, None, None]
        x = history.float()[:, None] * mask
        x = F.conv2d(x, self.conv1, self.bias1, padding=1).relu() * mask
        x = F.conv2d(x, self.conv2, self.bias2, padding=1).relu().mean(2)  # [N, 32, m]
        x = F.conv1d(x, self.conv3, self.bias3)[:, 0]
        return x.masked_fill(~is_there, -torch.inf)


SHAPES = {
    "conv1.weight": (16, 1, 3, 3),
    "conv1.bias": (16,),
    "conv2.weight": (32, 16, 3, 3),
    "conv2.bias": (32,),
    "conv3.weight": (1, 32, 1),
    "conv3.bias": (1,),
}


def _network(weights: Weights) -> Network:
    for name, shape in SHAPES.items():
        if tuple(weights.of(name).shape) != shape:
            raise ValueError(
                f"file must hold {name} {list(shape)}, and in {weights.path!r} it is "
                f"{list(weights.of(name).shape)}"
            )
    return Network(*(weights.of(name) for name in SHAPES))
