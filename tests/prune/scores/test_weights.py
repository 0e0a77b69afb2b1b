import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.layers import named_posteriors
from bayesprune.prune.scores.weights import magnitude, snr
from tests.cases import layers, structures


@structures
@layers
def test_snr_is_mean_over_std(case, std):
    layer = bp.to_variational(case.layer(), std=std).double()
    with torch.no_grad():
        for part in [part for name in layer.active_names() for part in layer.log_std_parts(name)]:
            part += torch.randn_like(part)
    found = bp.signal_to_noise(layer)
    assert list(found) == layer.active_names()
    for name, (mean, std_) in layer.posteriors().items():
        assert found[name].shape == mean.shape
        assert not found[name].requires_grad
        torch.testing.assert_close(found[name].double(), (mean.abs() / std_).detach(), rtol=1e-5, atol=0)


def test_names_are_those_of_the_model():
    model = bp.to_variational(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2)))
    assert list(bp.signal_to_noise(model)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    with pytest.raises(ValueError, match="no variational layer"):
        bp.signal_to_noise(nn.Linear(2, 2))


def test_all_weights_start_at_a_snr_relative_to_the_layers_rms():
    layer = bp.to_variational(nn.Linear(6, 5), relative_std=0.2)
    found = bp.signal_to_noise(layer)["weight"]
    torch.testing.assert_close(found.square().mean().sqrt(), torch.tensor(5.0))


def test_snr_does_not_change_with_the_scale_of_the_layer():
    """Batch norm may rescale a filter; |mean| changes, its SNR does not."""
    layer = bp.to_variational(nn.Linear(6, 5))
    before = bp.signal_to_noise(layer)["weight"]
    with torch.no_grad():
        layer.weight *= 3
        layer.weight_log_std += torch.tensor(3.0).log()
    torch.testing.assert_close(bp.signal_to_noise(layer)["weight"], before)


def test_snr_permutes_with_channels():
    layer = bp.to_variational(nn.Conv2d(3, 5, 2), std="rank_one")
    layer.weight_row_log_std.data.normal_()
    layer.weight_column_log_std.data.normal_()
    before, order = bp.signal_to_noise(layer)["weight"], torch.randperm(5)
    layer.weight.data = layer.weight.data[order]
    layer.weight_row_log_std.data = layer.weight_row_log_std.data[order]
    assert torch.equal(bp.signal_to_noise(layer)["weight"], before[order])


def test_removed_weights_have_no_signal():
    layer = bp.to_variational(nn.Linear(6, 5))
    layer.set_mask("weight", torch.rand(5, 6) > 0.5)
    assert torch.equal(bp.signal_to_noise(layer)["weight"] == 0, ~layer.weight_mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_are_float32(dtype):
    layer = bp.to_variational(nn.Linear(6, 5).to(dtype))
    for posterior in named_posteriors(layer):
        assert snr(posterior).dtype == magnitude(posterior).dtype == torch.float32
        torch.testing.assert_close(magnitude(posterior), posterior.mean.abs().float())
