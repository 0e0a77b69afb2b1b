import copy

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune import to_variational
from bayesprune.prune.batch_norm import recalibrate_batch_norm


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.BatchNorm2d(4, momentum=0.3), nn.Flatten(), nn.Linear(16, 2)
    )


def test_statistics_are_those_of_the_data_at_the_means():
    model = to_variational(net())
    data = [torch.randn(5, 3, 2, 2) * 2 + 1 for _ in range(4)]
    recalibrate_batch_norm(model, [(x, None) for x in data])
    with torch.no_grad():
        outputs = [nn.Conv2d.forward(model.eval()[0], x).transpose(0, 1).flatten(1) for x in data]
    torch.testing.assert_close(model[2].running_mean, torch.stack([o.mean(1) for o in outputs]).mean(0))
    torch.testing.assert_close(model[2].running_var, torch.stack([o.var(1) for o in outputs]).mean(0))


def test_nothing_else_changes():
    model = to_variational(net())
    model[2].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    recalibrate_batch_norm(model, [torch.ones(5, 3, 2, 2)])
    assert torch.equal(torch.get_rng_state(), generator), "no dropout, no sampled weight"
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model[2].momentum == 0.3
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}


def test_draws_no_more_batches_than_it_may():
    drawn = []
    batches = (drawn.append(index) or torch.randn(4, 3, 2, 2) for index in range(100))
    model = recalibrate_batch_norm(net(), batches, max_batches=7)
    assert drawn == list(range(7))
    assert model[2].num_batches_tracked == 7


def test_without_batch_norm_no_batch_is_drawn():
    model = nn.Linear(2, 2)
    assert recalibrate_batch_norm(model, iter(())) is model


def test_no_data_is_an_error_and_changes_nothing():
    model = net()
    model[2].running_mean.fill_(7.0)
    with pytest.raises(ValueError, match="data has no batch"):
        recalibrate_batch_norm(model, [])
    assert model[2].running_mean.tolist() == [7.0] * 4


def test_takes_keyword_batches():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, features, labels=None):
            return self.norm(features)

    model = recalibrate_batch_norm(Keyword(), [{"features": torch.full((4, 3), 2.0), "labels": None}])
    assert model.norm.running_mean.tolist() == [2.0] * 3


def test_frozen_norms_keep_their_statistics_and_learn_their_scales():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False)
    )
    x = torch.randn(16, 3) * 5 + 2
    expected = copy.deepcopy(model).eval()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    frozen = bp.prune.freeze_batch_norm(model)
    for _ in range(2):
        output = model.train()(x)
        torch.testing.assert_close(output, nn.Sequential(*expected[:3], copy.deepcopy(model[3]).train())(x))
    output.square().sum().backward()
    assert model[1].weight.grad.abs().sum() > 0
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    frozen.remove()
    model.train()(x)
    assert not torch.equal(model[1].running_mean, buffers["1.running_mean"])
    assert bp.prune.recalibrate_batch_norm(model, [x])[1].running_mean.abs().sum() > 0
