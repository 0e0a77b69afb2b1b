import pytest

from bayesprune.layers import STRUCTURES, part_shapes
from tests.cases import STRUCTURES as NAMES


def test_the_structures_are_these():
    assert tuple(STRUCTURES) == NAMES


@pytest.mark.parametrize(
    ("std", "shape", "unit_dims", "expected"),
    [
        ("per_weight", (5, 4), (0,), {"log_std": (5, 4)}),
        ("per_weight", (6, 2, 3, 3), (0,), {"log_std": (6, 2, 3, 3)}),
        ("per_channel", (5, 4), (0,), {"log_std": (5, 1)}),
        ("per_channel", (6, 2, 3, 3), (0,), {"log_std": (6, 1, 1, 1)}),
        ("per_channel", (4, 5), (1,), {"log_std": (1, 5)}),
        ("per_channel", (4, 3, 2, 2), (0, 1), {"log_std": (4, 3, 1, 1)}),
        ("rank_one", (5, 4), (0,), {"row_log_std": (5, 1), "column_log_std": (1, 4)}),
        ("rank_one", (6, 2, 3, 3), (0,), {"row_log_std": (6, 1, 1, 1), "column_log_std": (1, 2, 1, 1)}),
        ("rank_one", (4, 5), (1,), {"row_log_std": (1, 5), "column_log_std": (4, 1)}),
        ("rank_one", (4, 3, 2, 2), (0, 1), {"row_log_std": (1, 3, 1, 1), "column_log_std": (4, 1, 1, 1)}),
        *((std, (7,), (0,), {"log_std": (7,)}) for std in NAMES),
    ],
)
def test_shapes_of_the_parts(std, shape, unit_dims, expected):
    assert part_shapes(std, shape, unit_dims) == expected
