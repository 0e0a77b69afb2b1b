import pytest
from torch import nn

import bayesprune as bp
from bayesprune.train import default_temperature


@pytest.mark.parametrize(
    ("num_data", "expected"),
    [(4, 0.04), (100, 0.1), (25, 0.1), (1, 0.02)],
)
def test_many_weights_for_an_example_make_it_colder(num_data, expected):
    model = bp.to_variational(nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 20)))  # 400 weights, biases apart
    assert default_temperature(model, num_data) == pytest.approx(expected)
