from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.layers import variational_layers
from tests.oracles import STANDARD_ERRORS


class WithLogits(nn.Linear):
    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x), loss=None)


def net() -> nn.Module:
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 2)
    return bp.to_variational(nn.Sequential(*layers))


def overrides(model: nn.Module) -> list[str | None]:
    return [layer.estimator_override for _, layer in variational_layers(model)]


@pytest.mark.parametrize("training", [True, False])
def test_sampling_restores(training):
    model, x = net().train(training), torch.randn(2, 1, 4, 4)
    with bp.sampling(model, "flipout") as inside:
        assert inside is model
        assert overrides(model) == ["flipout", "flipout"]
        with bp.sampling(model[4], "mean"):
            assert overrides(model) == ["flipout", "mean"]
            with bp.sampling(model):
                assert overrides(model) == ["weight_sampling", "weight_sampling"]
            assert overrides(model) == ["flipout", "mean"]
    assert overrides(model) == [None, None]
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("estimator", ["mean", "weight_sampling"])
def test_sampling_restores_after_an_exception(estimator):
    model = net()
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError, match="mat1"), bp.sampling(model, estimator):
        model(torch.randn(2, 1, 9, 9))
    assert overrides(model) == [None, None]
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_sampling_in_evaluation_leaves_the_rest_in_evaluation():
    model, x = net().eval(), torch.randn(4, 1, 4, 4)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for estimator in ("auto", "weight_sampling", "flipout", "local_reparameterization"):
        with bp.sampling(model, estimator):
            assert not torch.equal(model(x), model(x))
    with bp.sampling(model, "mean"):
        assert torch.equal(model(x), model(x))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_mean_in_training_is_the_stock_forward():
    model, x = net().train(), torch.randn(4, 1, 4, 4)
    torch.manual_seed(1)
    with bp.sampling(model, "mean"):
        output = model(x)
    torch.manual_seed(1)
    assert torch.equal(bp.to_deterministic(model)(x), output)


def test_sampling_refuses():
    with pytest.raises(ValueError, match="estimator is 'laplace'; expected one of"), bp.sampling(net(), "laplace"):
        pass
    with pytest.raises(ValueError, match="without variational layers; call to_"), bp.sampling(nn.ReLU()):
        pass


def test_moments_of_a_linear_layer():
    """Mean and variance over the posterior, against the closed form."""
    layer = bp.to_variational(nn.Linear(6, 4), relative_std=0.5)
    x, num_samples = torch.randn(5, 6), 2000
    prediction = bp.predict(layer, x, num_samples=num_samples)
    mean, variance, samples = prediction
    std = layer.log_std("weight").exp(), layer.log_std("bias").exp()
    exact = (x.square() @ std[0].square().T + std[1].square()).detach()
    assert samples.shape == (num_samples, 5, 4)
    assert not samples.requires_grad
    torch.testing.assert_close(mean, samples.mean(0))
    torch.testing.assert_close(variance, samples.var(0))
    z_mean = (mean - layer.eval()(x)).abs() / (exact / num_samples).sqrt()
    z_variance = (variance / exact - 1).abs() / (2 / num_samples) ** 0.5
    print(f"largest |z| of the mean {z_mean.max():.2f}, of the variance {z_variance.max():.2f}")
    assert z_mean.max() < STANDARD_ERRORS
    assert z_variance.max() < STANDARD_ERRORS


def test_each_sample_is_one_draw_for_all_examples():
    """Examples of one sample meet the same weights: equal inputs give equal outputs."""
    layer = bp.to_variational(nn.Linear(6, 4))
    samples = bp.predict(layer, torch.ones(3, 6), num_samples=5).samples
    torch.testing.assert_close(samples[:, :1].expand_as(samples), samples)
    assert not torch.equal(samples[0], samples[1])


def test_predict_restores_modes_and_state():
    model = net().train()
    model[1].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    bp.predict(model, torch.randn(4, 1, 4, 4), num_samples=3)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError):
        bp.predict(model, torch.randn(4, 1, 9, 9), num_samples=3)
    assert [module.training for module in model.modules()] == modes
    assert overrides(model) == [None, None]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_predict_passes_arguments_and_takes_logits():
    model = bp.to_variational(nn.Sequential(nn.Flatten(), WithLogits(4, 2)))
    assert bp.predict(model, torch.randn(3, 2, 2), num_samples=2).mean.shape == (3, 2)
    transposed = bp.to_variational(nn.ConvTranspose1d(2, 2, 3, stride=2))
    assert bp.predict(transposed, torch.randn(1, 2, 3), num_samples=2, output_size=(8,)).mean.shape == (1, 2, 8)


def test_predict_refuses():
    model = net()
    x = torch.randn(2, 1, 4, 4)
    with pytest.raises(ValueError, match="predict method is 'laplace'; expected"):
        bp.predict(model, x, method="laplace")
    with pytest.raises(ValueError, match="num_samples is 1; a variance needs at least 2"):
        bp.predict(model, x, num_samples=1)
    with pytest.raises(ValueError, match="without variational layers"):
        bp.predict(nn.Linear(2, 2), torch.zeros(1, 2))
    pair = nn.Sequential(bp.to_variational(nn.Linear(2, 2)), nn.LSTM(2, 2))
    with pytest.raises(TypeError, match=r"the model returned tuple; expected a tensor or an output with `.logits`"):
        bp.predict(pair, torch.zeros(1, 2))
