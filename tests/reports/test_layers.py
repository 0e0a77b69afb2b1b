import math

import pytest
import torch
from torch import nn

from bayesprune.reports.layers import SNR_LOG10_EDGES, LayerSize, LayerSNR, layer_sizes, layer_snr, pair_layers


class TransposedLinear(nn.Module):
    """Weight as (in, out) and the sizes as `nx` and `nf`, like transformers' Conv1D."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nx, self.nf = nx, nf
        self.weight, self.bias = nn.Parameter(torch.ones(nx, nf)), nn.Parameter(torch.zeros(nf))


class Renamed(nn.Linear):
    stock_type = nn.Linear


@pytest.mark.parametrize(
    ("module", "name", "channels"),
    [
        (nn.Linear(3, 4), "Linear", 4),
        (Renamed(3, 4), "Linear", 4),
        (nn.Conv2d(4, 6, 3, groups=2), "Conv2d", 6),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), "ConvTranspose2d", 6),
        (nn.Embedding(11, 5), "Embedding", 5),
        (TransposedLinear(6, 3), "TransposedLinear", 6),
    ],
)
def test_channels_are_output_units(module, name, channels):
    (size,) = layer_sizes(nn.Sequential(module), {"0": 7})
    assert (size.name, size.type, size.channels, size.macs) == ("0", name, channels, 7)
    assert size.parameters == sum(parameter.numel() for parameter in module.parameters())


def test_norms_and_containers_are_no_layers_and_stds_do_not_count():
    model = nn.Sequential(nn.LayerNorm(3), nn.Sequential(nn.Linear(3, 4)), nn.ReLU())
    with torch.no_grad():
        model[1][0].weight.fill_(1)
        model[1][0].bias.zero_()
    model[1][0].weight_log_std = nn.Parameter(torch.ones(4, 3))
    assert layer_sizes(model, {"1.0": 0}) == (LayerSize("1.0", "Linear", 4, 16, 12, 0),)


def counts(bins):
    return tuple(bins.get(i, 0) for i in range(len(SNR_LOG10_EDGES) - 1))


def test_snr_is_counted_per_layer_in_fixed_bins():
    values = torch.tensor([[0.0, 1e-9, 0.5], [1.0, 1.1, math.inf]])
    (layer,) = layer_snr({"a.b.weight": values, "a.b.bias": torch.full((9,), 100.0)})
    assert SNR_LOG10_EDGES[12] == 0
    assert layer.counts == counts({0: 2, 10: 1, 12: 2, 23: 1})
    assert (layer.name, layer.fraction_below_one, layer.median) == ("a.b", 0.5, 0.5)


def test_weights_of_one_layer_are_pooled_and_nan_is_left_out():
    snr = {
        "attention.q_proj_weight": torch.tensor([2.0, math.nan]),
        "attention.k_proj_weight": torch.tensor([4.0, 4.0]),
        "removed.weight": torch.tensor([math.nan]),
        "weight": torch.tensor([1.0]),
    }
    first, model = layer_snr(snr)
    assert (first.name, first.median, sum(first.counts)) == ("attention", 4.0, 3)
    assert model.name == ""


def test_a_histogram_of_another_length_is_refused():
    with pytest.raises(ValueError, match="'a' has 2 bins; expected 24"):
        LayerSNR("a", 1.0, 0.0, (1, 2))


def test_rows_pair_layers_by_name():
    before = [LayerSize("a", "Conv2d", 8, 80, 80, 800), LayerSize("gone", "Linear", 4, 40, 40, 400)]
    after = [LayerSize("new", "Linear", 2, 20, 20, 200), LayerSize("a", "Conv2d", 6, 60, 50, 600)]
    snr = LayerSNR("a", 2.0, 0.1, counts({12: 1}))
    kept, gone, new = pair_layers(before, after, [snr])
    assert (kept.channels, kept.channels_kept, kept.parameters_kept, kept.nonzero_parameters_kept) == (8, 6, 60, 50)
    assert (kept.macs, kept.macs_kept, kept.snr) == (800, 600, snr)
    assert (gone.name, gone.channels, gone.channels_kept, gone.snr) == ("gone", 4, 0, None)
    assert (new.name, new.channels, new.channels_kept) == ("new", 0, 2)
