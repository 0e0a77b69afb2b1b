"""What calibration data say: the tilt by which a budget is divided, and the same cut whenever they are the same."""

import copy

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.prune.channels.calibrated import best_tilt


@pytest.mark.parametrize(("lowest", "expected"), [(1.8, 2), (-1.2, -1), (0.2, 0), (9, 3), (-9, -3)])
def test_the_tilt_is_found_on_either_side(lowest, expected):
    tried = []

    def loss(tilt: float) -> float:
        tried.append(tilt)
        return (tilt - lowest) ** 2

    assert best_tilt(loss) == expected
    assert len(tried) == len(set(tried)) <= 7


def test_a_step_up_that_does_not_pay_hides_no_better_one():
    losses = {0: 0.343, 1: 0.349, 2: 0.31, 3: 0.30}
    assert best_tilt(lambda tilt: losses[int(tilt)]) == 3


def test_a_tilt_that_changes_nothing_is_none():
    assert best_tilt(lambda tilt: 1.0) == 0


def test_a_cut_does_not_depend_on_the_random_state_and_leaves_it_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5))
    data, after = [torch.randn(16, 6)], []
    bp.to_variational(net)
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        cut = copy.deepcopy(net)
        bp.prune_channels(cut, data[0], "macs=0.3", data=data)
        assert torch.equal(torch.get_rng_state(), before)
        after.append(cut.state_dict())
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


def test_channels_that_no_posterior_reads_take_part_in_the_cut():
    torch.manual_seed(0)
    layers = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)
    net = bp.to_variational(nn.Sequential(*layers), filter_fn=lambda layer, name: name != "4")
    data = [torch.randn(128, 8)]
    report = bp.prune_channels(net, data[0][:2], "macs=0.4", data=data)
    assert all(8 < kept < 32 for kept in report.sizes.values())
    assert report.how.startswith(
        "channels ranked by UnitSNRImportance (2 by ScaleSNRImportance, since no layer of the posterior reads them);"
    )


def test_units_that_the_data_never_switch_on_leave_first_where_no_posterior_reads_them():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))
    net[0].weight.data[3] *= 3
    net[0].bias.data[3] = -100
    bp.to_variational(net, filter_fn=lambda layer, name: name == "0")
    x = torch.randn(64, 8)
    report = bp.prune_channels(net, x[:1], {"0": 11}, data=[x])
    assert report.removed == {"0": (3,)}


def test_inputs_that_are_constant_are_no_obstacle():
    """Their covariance is rounding noise, which has negative directions."""
    torch.manual_seed(0)
    hidden = nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU()
    net = bp.to_variational(nn.Sequential(*hidden, nn.Linear(24, 8)).eval())
    net[0].weight.data.zero_()
    net[0].bias.data.uniform_(0.5, 3)
    report = bp.prune_channels(net, torch.randn(2, 4), "macs=0.5", data=torch.randn(800, 4).split(200))
    assert report.macs_after <= 0.5 * report.macs_before
