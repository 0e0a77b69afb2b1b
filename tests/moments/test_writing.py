"""What is written into a tensor: mean and variance go where the entries go, and all that looks there sees it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesprune.moments import Moments, parts, settings

INDEX, MASK = torch.tensor([2, 0, 2]), torch.tensor([[True, False], [False, True], [True, True], [False, False]])
ROWS = torch.tensor([[2, 0], [1, 1], [2, 3]])


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uncertain(*shape: int, seed: int = 0) -> Moments:
    return Moments(tensor(*shape, seed=seed), tensor(*shape, seed=seed + 1).abs() + 0.1)


# Of a tensor (4, 2) and another (3, 2); a linear map with weights of 0 and 1 does to variances what it does to means.
WRITES = {
    "index_add": lambda x, y: x.index_add(0, INDEX, y),
    "index_add_": lambda x, y: x.index_add_(0, INDEX, y),
    "torch.index_add": lambda x, y: torch.index_add(x, 0, index=INDEX, source=y),
    "index_copy": lambda x, y: x.index_copy(0, INDEX[:2], y[:2]),
    "index_copy_": lambda x, y: x.index_copy_(0, INDEX[:2], y[:2]),
    "index_put_": lambda x, y: x.index_put_((INDEX,), y, accumulate=True),
    "index_put": lambda x, y: x.index_put((INDEX[:2], INDEX[:2] // 2), y[0]),
    "scatter": lambda x, y: x.scatter(0, ROWS, y),
    "scatter_": lambda x, y: x.scatter_(0, ROWS, y),
    "scatter_add": lambda x, y: torch.scatter_add(x, 0, ROWS, y),
    "scatter_add_": lambda x, y: x.scatter_add_(0, ROWS, y),
    "scatter_reduce": lambda x, y: x.scatter_reduce(0, ROWS, y, "sum"),
    "scatter_reduce_": lambda x, y: x.scatter_reduce_(0, ROWS, y, "sum", include_self=False),
    "masked_scatter": lambda x, y: x.masked_scatter(MASK, y),
    "masked_scatter_": lambda x, y: x.masked_scatter_(MASK, y),
    "select_scatter": lambda x, y: x.select_scatter(y[1], 0, 2),
    "slice_scatter": lambda x, y: x.slice_scatter(y[:2], 0, 1, 4, 2),
    "slice_scatter, columns": lambda x, y: x.slice_scatter(y[:1].mT.repeat(2, 1)[:, :1], 1, 1, 2),
    "diagonal_scatter": lambda x, y: x.diagonal_scatter(y[0]),
    "copy_": lambda x, y: x.copy_(y[0]),
    "rows": lambda x, y: x.__setitem__(slice(1, None), y) or x,
    "list": lambda x, y: x.__setitem__(INDEX[:2], y[:2]) or x,
    "mask": lambda x, y: x.__setitem__(MASK, y.flatten()[:4]) or x,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_move_means_and_variances_alike(write):
    x, y = uncertain(4, 2), uncertain(3, 2, seed=5)
    old, new = parts(x), parts(y)
    result = write(x, y)
    torch.testing.assert_close(parts(result).mean, write(old.mean.clone(), new.mean))
    torch.testing.assert_close(result.variance, write(old.variance.clone(), new.variance))


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_certain_is_written_without_variance(write):
    x, y = uncertain(4, 2), tensor(3, 2, seed=5)
    old = parts(x)
    result = write(x, y)
    torch.testing.assert_close(parts(result).mean, write(old.mean.clone(), y))
    variance = torch.zeros_like(old.mean) if result.variance is None else result.variance
    torch.testing.assert_close(variance, write(old.variance.clone(), torch.zeros_like(y)))


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_plain_tensor_takes_what_is_uncertain(write):
    x, y = tensor(4, 2), uncertain(3, 2, seed=5)
    old = x.clone()
    result = write(x, y)
    torch.testing.assert_close(parts(result).mean, write(old.clone(), parts(y).mean))
    torch.testing.assert_close(result.variance, write(torch.zeros_like(old), y.variance))


def test_what_is_added_is_scaled():
    x = torch.zeros(4, 2).index_add(0, INDEX, uncertain(3, 2).float(), alpha=3)
    expected = torch.zeros(4, 2).index_add(0, INDEX, uncertain(3, 2).variance.float(), alpha=9)
    torch.testing.assert_close(x.variance, expected)


def test_numbers_are_certain():
    x = uncertain(4, 2)
    before = x.variance.clone()
    for made in (x.index_fill(0, INDEX, 7.0), x.scatter(0, ROWS[:, :1], 7.0), x.clone().masked_fill_(MASK, 7.0)):
        assert torch.equal(made.variance == 0, parts(made).mean == 7)
    assert torch.equal(x.variance, before)
    assert not x.clone().fill_(2.0).variance.any()
    assert (x.zero_().mean == 0).all()
    assert x.variance is None or not x.variance.any()
    assert (x.normal_().mean != 0).all()


@pytest.mark.parametrize("reduce", ["amax", "amin"])
def test_an_extreme_has_the_variance_of_the_entry_that_it_is(reduce):
    x, y = uncertain(4, 2), uncertain(3, 2, seed=5)
    result = x.scatter_reduce(0, ROWS, y, reduce)
    entries = torch.cat([parts(x).mean, parts(y).mean]).flatten()
    variances = torch.cat([x.variance, y.variance]).flatten()
    found = (parts(result).mean.flatten()[:, None] == entries).int().argmax(1)
    torch.testing.assert_close(result.variance.flatten(), variances[found])
    with pytest.raises(NotImplementedError, match="reduce='prod' has no rule; expected sum, mean, amax or amin"):
        x.scatter_reduce(0, ROWS, y, "prod")


def test_a_mean_by_index():
    x, y = uncertain(4, 2), uncertain(3, 2, seed=5)
    result = x.scatter_reduce(0, ROWS[:, :1], y, "mean", include_self=False)
    torch.testing.assert_close(parts(result).mean[2, 0], parts(y).mean[[0, 2], 0].mean())
    torch.testing.assert_close(result.variance[2, 0], y.variance[[0, 2], 0].sum() / 4)
    torch.testing.assert_close(result.variance[3, 1], x.variance[3, 1])


def test_a_write_into_a_view_is_seen_by_all_that_look_there():
    x = uncertain(4, 3)
    expected = x.variance.clone()
    view, other = x[1:].T, x.view(2, 6)
    view[0].mul_(2.0)
    expected[1:, 0] *= 4
    torch.testing.assert_close(x.variance, expected)
    torch.testing.assert_close(other.variance, expected.view(2, 6))
    x.mul_(3.0)
    torch.testing.assert_close(view.variance, 9 * expected[1:].T)
    other.unbind(0)[1].zero_()
    assert not x.variance[2:].any()
    assert (x.variance[:2] > 0).all()
    del x
    view.add_(uncertain(3, 3, seed=9))
    torch.testing.assert_close(other.variance[1], uncertain(3, 3, seed=9).variance.T.flatten()[3:])


def test_a_copy_is_no_view():
    x = uncertain(4, 3)
    before = x.variance.clone()
    for copied in (x[INDEX], x.clone(), x.T.reshape(12), x[MASK[:, 0]], 1 * x):
        copied.zero_()
    assert torch.equal(x.variance, before)
    assert x.double() is x.to(torch.float64) is x.contiguous() is x


def test_what_is_computed_before_a_write_stays():
    x = uncertain(4, 3)
    y = x.sigmoid()
    expected = uncertain(4, 3).sigmoid().variance
    x[:, 0] = 0.0
    torch.testing.assert_close(y.variance, expected)


def test_a_view_keeps_what_its_positions_share():
    x = Moments(tensor(2, 3, 4), torch.ones(2, 3, 4), torch.full((2, 1, 4), 0.5))
    view = x.transpose(1, 2)
    F.relu(view, inplace=True)
    assert view.shared.shape == (2, 4, 1)
    assert torch.equal(x.variance, view.variance.mT)


def test_plain_buffers_are_filled_by_slices():
    y = uncertain(2, 3)
    cache, copies = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, 2, 3, dtype=torch.float64)
    held = {"cache": cache}
    cache[:, 1:4] = y
    held["cache"][:, 4] += y[:, 0]
    assert type(held["cache"]) is Moments
    expected = torch.cat([torch.zeros(2, 1).double(), y.variance, y.variance[:, :1]], 1)
    torch.testing.assert_close(cache.variance, expected)
    copies[1].copy_(y)  # a plain view
    torch.testing.assert_close(copies.variance, torch.stack([torch.zeros(2, 3).double(), y.variance]))
    assert torch.equal(parts(copies).mean[1], parts(y).mean)
    torch.testing.assert_close((2 * copies).sum((0, 2)).variance, 4 * y.variance.sum(1))


def test_a_plain_view_made_before_the_write_holds_nan_where_it_went():
    whole = torch.zeros(2, 3)
    left, right = whole[:, :2], whole[:, 2:]
    whole[:, 2] = uncertain(2).float()
    assert not left.any()
    assert right.isnan().all()
    left.add_(1.0)
    left.add_(uncertain(2, 2).float())
    assert (whole.variance > 0).all()
    assert right.isnan().all()


def test_views_without_a_base_are_refused():
    with torch.inference_mode():
        buffer = torch.zeros(2, 3)
        with pytest.raises(TypeError, match="run under torch.no_grad"):
            buffer[0].copy_(uncertain(3))
        buffer[0] = uncertain(3).float()
        assert (buffer.variance[0] > 0).all()


def test_a_model_keeps_its_parameters_and_buffers():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.zeros(3))
            self.attribute, self.weight = torch.zeros(3), nn.Parameter(torch.zeros(3))

        def forward(self, x, name):
            return getattr(self, name).detach().copy_(x) if name == "view" else getattr(self, name).copy_(x)

    model = nn.Sequential(Writes())
    for name in ("cache", "attribute"):
        with pytest.raises(TypeError, match=r"a tensor of the model \(torch.float32\) got an uncertain tensor"):
            model[0](uncertain(3), name)
    with torch.no_grad(), pytest.raises(TypeError, match="a Parameter"):
        model[0](uncertain(3), "weight")
    with pytest.raises(TypeError, match=r"a Tensor \(torch.int64\)"):
        torch.zeros(3, dtype=torch.long)[0] = uncertain(3)[0]
    assert not model[0].cache.any()
    assert type(model[0].cache) is Tensor


def test_a_shape_changed_in_place():
    x = uncertain(4, 1)
    assert x.squeeze_(1) is x
    assert x.shape == x.variance.shape == (4,)
    assert x.unsqueeze_(0).t_().shape == (4, 1)


def test_directions_go_along():
    with settings(covariance="low_rank", num_directions=2):
        directions = tensor(2, 3, 2, seed=3)
        y = Moments.along(tensor(3, 2), directions, torch.full((3, 2), 0.25))
        buffer = torch.zeros(4, 2, dtype=torch.float64)
        added = buffer.index_add(0, INDEX, y)
        buffer[1:] = y
        view = buffer[2:]
        view.mul_(2.0)
        torch.testing.assert_close(added.directions, torch.zeros(2, 4, 2).double().index_add(1, INDEX, directions))
        torch.testing.assert_close(buffer.directions[:, 2:], 2 * directions[:, 1:])
        torch.testing.assert_close(buffer.variance[1], directions[:, 0].square().sum(0) + 0.25)


def test_gradients_pass_through_a_buffer():
    log_std = torch.zeros(3, requires_grad=True)
    buffer = torch.zeros(2, 3)
    buffer[1] = Moments(torch.ones(3), (2 * log_std).exp())
    (2 * buffer).variance.sum().backward()
    torch.testing.assert_close(log_std.grad, torch.full((3,), 8.0))
