"""Ridge regression from sums of products: it bears the rounding of single precision, and says so where it cannot."""

import pytest
import torch

from bayesprune.laplace.regression import ridge


def test_products_that_rounding_made_indefinite_are_damped_more():
    start, kept = torch.zeros(1, 1, 4, dtype=torch.double), torch.ones(1, 1, 4, dtype=torch.bool)
    xx = torch.diag(torch.tensor([4.0, 1.0, 1.0, -5e-3], dtype=torch.double))[None]
    yx = torch.tensor([[[4.0, 2.0, 3.0, 0.0]]], dtype=torch.double)
    found = ridge(start, kept, xx, yx, 1e-3)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 2.0, 3.0, 0.0]]], dtype=torch.double), rtol=2e-2, atol=0)


def test_products_that_are_no_numbers_are_refused():
    start, kept = torch.zeros(1, 1, 2, dtype=torch.double), torch.ones(1, 1, 2, dtype=torch.bool)
    xx = torch.full((1, 2, 2), torch.nan, dtype=torch.double)
    with pytest.raises(torch.linalg.LinAlgError):
        ridge(start, kept, xx, torch.zeros(1, 1, 2, dtype=torch.double), 1e-3)
