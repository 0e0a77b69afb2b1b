"""What is chosen by device gives what torch gives."""

import pytest
import torch

from bayesprune.foundation.device import kth_smallest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (257,), (1, 1000), (50, 4), (3, 5, 7)])
def test_the_kth_smallest_is_that_of_a_sorted_row(shape, dtype):
    values = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(0)).to(dtype) / 4  # many are equal
    values.flatten()[:: max(2, values.numel() // 3)] = -torch.inf
    before = values.clone()
    for k in {1, shape[-1] // 2 + 1, shape[-1]}:
        found = kth_smallest(values, k)
        assert found.dtype == dtype
        assert torch.equal(found, values.sort(dim=-1).values[..., k - 1 : k])
    assert torch.equal(values, before)
