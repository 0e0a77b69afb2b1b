"""The factored covariance is the P x P one; it is first order in the noise of the weights; what it refuses."""

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune import evi
from bayesprune.errors import UnsupportedModelError
from bayesprune.evi import propagation
from tests.evi import dense

# torch's own table of forward derivatives, which first-order moments use, is loaded with it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


def one_layer(*, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 5, bias=bias), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 16, 3))


def two_layers() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


def converted(model: nn.Module, relative_std: float = 0.3) -> nn.Module:
    """In float64, with a different std for every kernel."""
    torch.manual_seed(0)
    model = evi.convert(model, relative_std=relative_std).double()
    for name, part in model.named_parameters():
        if name.endswith("weight_log_std"):
            part.data = part.data.double() + 0.5 * torch.randn_like(part, dtype=torch.float64)
        elif name.endswith("log_std"):
            part.data = part.data.double()
    return model


CHAINS = {
    "one convolution": (one_layer, (3, 1, 12, 12)),
    "convolution with bias": (lambda: one_layer(bias=True), (3, 1, 12, 12)),
    "no pooling": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)), (2, 1, 6, 6)),
    "pooling first": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ELU(), nn.Flatten(), nn.Linear(8, 3)),
        (2, 1, 6, 6),
    ),
    "pooled twice": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)),
        (2, 1, 10, 10),
    ),
    "two convolutions, three linear layers": (two_layers, (2, 2, 12, 12)),
    "linear layers alone": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (4, 6)),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_factors_give_the_dense_covariance(chain):
    build, shape = CHAINS[chain]
    model = converted(build())
    x = torch.randn(*shape, dtype=torch.float64)
    mean, covariance = propagation.logit_moments(model, x)
    expected_mean, expected = dense.logit_moments(model, x)
    assert torch.equal(mean, model.eval()(x))
    torch.testing.assert_close(mean, expected_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance, expected, rtol=1e-10, atol=1e-10)
    assert float(covariance.detach().diagonal(dim1=1, dim2=2).min()) > 0


def test_gradients_are_those_of_the_dense_computation():
    model = converted(two_layers())
    x = torch.randn(2, 2, 12, 12, dtype=torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    found, expected = (
        torch.autograd.grad(f(model, x)[1].square().sum(), trained, allow_unused=True)
        for f in (propagation.logit_moments, dense.logit_moments)
    )
    for gradient, other in zip(found, expected, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-10)


def test_covariance_of_one_convolution_is_that_of_the_linearised_network():
    """To first order logits move with the kernels by their Jacobian G: the covariance is sum_k s_k G_k G_k^T."""
    model = converted(one_layer())
    convolution, linear = model[0], model[4]
    linear.weight_log_std.data.fill_(-20)
    x = torch.randn(3, 1, 12, 12, dtype=torch.float64)

    def logits(weight):
        return torch.func.functional_call(model.eval(), {"0.weight": weight}, (x,))

    jacobian = torch.func.jacrev(logits)(convolution.weight).flatten(3)  # (N, C, K, taps)
    expected = torch.einsum("nckt,ndkt,k->ncd", jacobian, jacobian, convolution.weight_log_std.flatten().exp() ** 2)
    torch.testing.assert_close(propagation.logit_moments(model, x)[1], expected, rtol=1e-9, atol=1e-10)


def test_covariance_agrees_with_weight_samples_where_the_noise_is_small():
    model = converted(one_layer(), relative_std=0.01).eval()
    x = torch.randn(2, 1, 12, 12, dtype=torch.float64)
    num_samples = 4000
    samples = bp.predict(model, x, num_samples=num_samples).samples
    mean, covariance = propagation.logit_moments(model, x)
    deviations = samples - mean
    sampled = torch.einsum("snc,snd->ncd", deviations, deviations) / num_samples
    variance = covariance.diagonal(dim1=1, dim2=2)
    error = ((variance.unsqueeze(1) * variance.unsqueeze(2) + covariance.square()) / num_samples).sqrt()
    z = ((sampled - covariance) / error).abs().max()
    assert z < 5, f"largest z-score {z:.2f}"


def test_diagonal_propagation_misses_what_positions_share():
    """The same variances enter; without the covariance of positions the logits' variances differ."""
    model = converted(one_layer())
    x = torch.rand(4, 1, 12, 12, dtype=torch.float64)
    full = evi.propagate(model, x, covariance="spatial")
    diagonal = evi.propagate(model, x, covariance="diagonal")
    torch.testing.assert_close(full.mean, diagonal.mean, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(full.covariance, diagonal.covariance, rtol=0.1)


def test_dropout_multiplies_the_scale():
    model = converted(one_layer())
    dropped = nn.Sequential(*model[:3], nn.Dropout(0.5), *model[3:])
    x = torch.rand(2, 1, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(
        propagation.logit_moments(dropped.eval(), x), propagation.logit_moments(model, x), rtol=0.0, atol=0.0
    )
    torch.manual_seed(1)
    kept = nn.functional.dropout(torch.ones(2, 4, 4, 4, dtype=torch.float64), 0.5)
    torch.manual_seed(1)
    mean, covariance = propagation.logit_moments(dropped.train(), x)
    for index in range(2):
        masked = converted(one_layer())
        masked.load_state_dict(model.state_dict())
        masked[4].weight.data *= kept[index].flatten()
        expected = propagation.logit_moments(masked, x[index : index + 1])
        torch.testing.assert_close(mean[index : index + 1], expected.mean, rtol=1e-12, atol=1e-12)
        through = expected.covariance - own_noise(masked, x[index : index + 1])
        found = covariance[index] - own_noise(dropped, x[index : index + 1], kept[index : index + 1])
        torch.testing.assert_close(found, through[0], rtol=1e-10, atol=1e-12)


def own_noise(model, x, kept=1.0):
    """What the last layer's own weights add, from the moments that reach it."""
    features = propagation._through(model[:3], "", x)
    energy = ((features.mean.square() + propagation._variance(features)) * torch.as_tensor(kept) ** 2).sum()
    return torch.diag_embed(model[-1].posteriors()["weight"].std.flatten().square() * energy)


class Doubled(nn.Conv2d):
    """A subclass that does more than its base."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(1, 2, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)], r"no rule for 1 \(AvgPool2d\)"),
        ([nn.Conv2d(1, 2, 3), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(2, 3)], "windows of 1 overlap"),
        ([nn.Conv2d(1, 2, 3, padding="same"), nn.Flatten(), nn.Linear(72, 3)], "padding='same'"),
        ([nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()], "without an uncertain linear layer"),
        ([nn.Conv2d(1, 2, 3), nn.Linear(4, 3)], r"no rule for 1 \(VariationalLinear\)"),
        ([nn.Linear(6, 3)], r"no rule for 0 \(VariationalLinear\)"),
        ([Doubled(1, 2, 3), nn.Flatten(), nn.Linear(32, 3)], r"no rule for 0 \(VariationalDoubled\)"),
    ],
)
def test_refuses_what_it_has_no_rule_for(layers, message):
    with pytest.raises(UnsupportedModelError, match=message):
        propagation.logit_moments(evi.convert(nn.Sequential(*layers)), torch.rand(2, 1, 6, 6))


def test_refuses_other_posteriors():
    x = torch.rand(2, 1, 12, 12)
    with pytest.raises(UnsupportedModelError, match="one std per kernel"):
        propagation.logit_moments(bp.to_variational(one_layer()), x)
    with pytest.raises(UnsupportedModelError, match="bias of 0 is uncertain"):
        propagation.logit_moments(bp.to_variational(one_layer(bias=True), std="per_channel"), x)
