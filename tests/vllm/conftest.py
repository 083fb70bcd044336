"""What tests of prompts share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from adakv.policy import LayerInputs, PromptAttention


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[LayerInputs]:
    """Parts of prompts that H2O and column maxima have folded."""
    parts: list[LayerInputs] = []
    fold = PromptAttention.fold

    def watched(scorer: PromptAttention, folded: Any, part: LayerInputs) -> Tensor:
        parts.append(part)
        return fold(scorer, folded, part)

    monkeypatch.setattr(PromptAttention, "fold", watched)
    return parts
