"""value_norm against its definition."""

from __future__ import annotations

import pytest
import torch

import reference
from adakv import ops
from cases import CORNER_PROMPTS, DTYPES, PROMPTS, Prompt
from tolerance import assert_close


@pytest.mark.parametrize("norm", ["l1", "l2_gram"])
@pytest.mark.parametrize("case", [*PROMPTS, *CORNER_PROMPTS], ids=str)
def test_value_norm_equals_definition(case: Prompt, norm: str, device: torch.device) -> None:
    values, w_o, seq_lens = case.entries(device), case.w_o(device), case.lengths(device)
    expected = reference.value_norm(values, w_o, seq_lens=seq_lens, norm=norm)
    baseline = reference.value_norm(values, w_o, seq_lens=seq_lens, norm=norm, dtype=case.dtype)
    assert_close(ops.value_norm(values, w_o, seq_lens=seq_lens, norm=norm), expected, baseline)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 33, 200])
def test_value_norm_of_any_model_width(
    width: int, dtype: torch.dtype, device: torch.device
) -> None:
    case = Prompt(length=270, group=3, head_dim=72, dtype=dtype)
    values, w_o = case.entries(device), case.w_o(device, width)
    for norm in ("l1", "l2_gram"):
        expected = reference.value_norm(values, w_o, norm=norm)
        baseline = reference.value_norm(values, w_o, norm=norm, dtype=dtype)
        assert_close(ops.value_norm(values, w_o, norm=norm), expected, baseline, norm)


def test_value_norm_l2_bounds_l1(device: torch.device) -> None:
    case = Prompt(length=200, group=1)
    values, w_o = case.entries(device), case.w_o(device)
    l1, l2 = (ops.value_norm(values, w_o, norm=norm) for norm in ("l1", "l2_gram"))
    assert (l2 <= l1 * (1 + 1e-5)).all()
    assert (l1 <= l2 * w_o.shape[0] ** 0.5 * (1 + 1e-5)).all()


def test_value_norm_gives_the_same_bits_for_any_number_of_threads() -> None:
    case = Prompt(length=700, dtype=torch.bfloat16)
    values, w_o = case.entries(torch.device("cpu")), case.w_o(torch.device("cpu"))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.value_norm(values, w_o))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_value_norm_names_what_is_wrong(device: torch.device) -> None:
    case = Prompt()
    values, w_o = case.entries(device), case.w_o(device)
    with pytest.raises(ValueError, match="w_o"):
        ops.value_norm(values, w_o[:, :-8])
    with pytest.raises(ValueError, match="float32"):
        ops.value_norm(values, w_o.bfloat16())
