"""Modules passed by samples: against their own rules, against weight samples, and what they refuse."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.errors import UnsupportedFunctionError
from bayesprune.moments import Moments, parts, sampled, settings

pytestmark = pytest.mark.filterwarnings("ignore:moments pass")


class Decomposed(nn.Module):
    """Has no rule: a singular value decomposition behind a linear layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.linalg.svdvals(F.silu(self.linear(x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.lstm, self.after = nn.Linear(3, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.after(self.lstm(self.before(x))[0].mean(1))


def model(*inner: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return bp.to_variational(nn.Sequential(nn.Linear(3, 4), *inner), relative_std=0.05)


def example(*shape: int, shared: tuple[int, ...] | None = None) -> Moments:
    generator = torch.Generator().manual_seed(0)
    common = None if shared is None else torch.full(shared, 0.3)
    return Moments(torch.randn(shape, generator=generator), torch.ones(shape), common)


X = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1))


def test_the_error_names_the_way_out():
    made = model(Decomposed())
    with pytest.raises(UnsupportedFunctionError, match=r"inside bayesprune.moments.sampled\(model, 'Decomposed'\)"):
        bp.predict(made, X, method="moments")
    said = r"pass 1 \(Decomposed\) by 16 samples: .* relative error of about 35%"
    with pytest.warns(UserWarning, match=said), sampled(made, "Decomposed", num_samples=16) as names:
        prediction = bp.predict(made, X, method="moments")
    assert names == ["1"]
    assert (prediction.variance > 0).all()


def test_weights_inside_are_drawn_too():
    """One median over many outputs, against weight samples of the whole model."""
    torch.manual_seed(0)
    made = model(Decomposed())
    with sampled(made, Decomposed, num_samples=200):
        got = bp.predict(made, X, method="moments").variance
    torch.manual_seed(1)
    found = bp.predict(made, X, num_samples=200).variance
    assert 0.8 < (got / found).median() < 1.25


def test_recurrent_layers_pass():
    torch.manual_seed(0)
    made = bp.to_variational(Recurrent(), relative_std=0.05)
    with sampled(made, nn.LSTM, num_samples=200):
        got = bp.predict(made, X, method="moments").variance
    torch.manual_seed(1)
    found = bp.predict(made, X, num_samples=300).variance
    assert 0.6 < (got / found).median() < 1.6


def test_the_same_at_every_pass_and_no_trace_of_it():
    made = model(Decomposed())
    state = torch.random.get_rng_state()
    with sampled(made, "1.linear", "1", num_samples=4):
        first, second = (bp.predict(made, X, method="moments") for _ in range(2))
    assert torch.equal(first.variance, second.variance)
    assert torch.equal(state, torch.random.get_rng_state())
    assert "forward" not in made[1].__dict__
    with sampled(made, "1", num_samples=4, seed=None):
        third = bp.predict(made, X, method="moments")
    assert not torch.equal(first.variance, third.variance)


def test_against_a_rule_with_what_positions_share():
    """A linear layer by samples and by its rule: mean, variance, and the covariance of two tokens."""
    linear, x = nn.Linear(4, 3), example(2, 6, 4, shared=(2, 1, 4))
    expected = linear(x)
    with sampled(linear, nn.Linear, num_samples=4000):
        got = linear(x)
    torch.testing.assert_close(got.variance, expected.variance, rtol=0.15, atol=0)
    assert got.shared.shape == (2, 1, 3)
    torch.testing.assert_close(got.shared, expected.shared, rtol=0.15, atol=0.01)
    with settings(covariance="diagonal"), sampled(linear, "Linear", num_samples=4):
        assert linear(x).shared is None


def test_directions_go_along():
    linear = nn.Linear(4, 3)
    with settings(covariance="low_rank", num_directions=2):
        x = Moments.along(torch.zeros(6, 4), torch.randn(2, 6, 4), torch.full((6, 4), 0.01))
        expected = linear(x)
        with sampled(linear, nn.Linear, num_samples=1000):
            got = linear(x)
    torch.testing.assert_close(got.directions, expected.directions, rtol=0.1, atol=0.1)
    torch.testing.assert_close(got.variance, expected.variance, rtol=0.2, atol=0.02)


def test_gradients_reach_what_is_before_and_inside():
    made = model(Decomposed())
    made.train()
    with sampled(made, "Decomposed", num_samples=4), bp.sampling(made, "moments"):
        made(X).variance.sum().backward()
    for layer in (made[0], made[1].linear):
        assert layer.weight_log_std.grad.abs().sum() > 0


def test_refusals():
    made = model(nn.Tanh())
    with pytest.raises(ValueError, match="sampled got LSTM, which no module of the model is; its types are"):
        sampled(made, nn.LSTM).__enter__()
    with pytest.raises(ValueError, match="num_samples is 1; a variance needs at least 2"):
        sampled(made, nn.Tanh, num_samples=1).__enter__()

    class Chooses(nn.Module):
        def forward(self, x):
            return x, x.argmax(-1)

    with sampled(chooses := Chooses(), Chooses), pytest.raises(TypeError, match="differs from draw to draw"):
        chooses(example(50, 4))


def test_certain_inputs_and_numbers_go_through():
    class Counts(nn.Module):
        def forward(self, x, scale=1.0):
            return {"out": scale * x, "count": x.shape[0], "mask": torch.ones(2, dtype=torch.bool)}

    counts = Counts()
    with sampled(counts, Counts, num_samples=64):
        found = counts(example(3), scale=2.0)
        plain = counts(torch.ones(3))
    assert found["count"] == 3
    assert found["mask"].all()
    assert (found["out"].variance > 1).all()
    assert torch.equal(parts(plain["out"]).mean, torch.ones(3))
    assert (plain["out"].variance == 0).all()


def test_one_warning():
    made = model(Decomposed())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sampled(made, "Decomposed", num_samples=2):
            bp.predict(made, X, method="moments")
    assert len(caught) == 1
    assert caught[0].filename == __file__
