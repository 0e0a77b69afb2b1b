import copy

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune import to_variational
from bayesprune.prune.batch_norm import recalibrate_batch_norm, recalibrate_if_better


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


def flat() -> nn.Module:
    """A net with statistics, of which batch norms in one dimension cannot measure a single example."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2)).train()
    for _ in range(3):
        model(torch.randn(16, 3) * 5 + 2)
    return model.eval()


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_frozen_norms_are_measured_anew_and_stay_frozen():
    model, data = flat(), [torch.randn(8, 3) for _ in range(2)]
    expected = statistics(recalibrate_batch_norm(copy.deepcopy(model), data))
    with bp.prune.freeze_batch_norm(model):
        assert_same(statistics(recalibrate_batch_norm(model, data)), expected)
        model.train()(data[0])
        assert_same(statistics(model), expected)


def test_a_batch_of_one_example_is_passed_over_where_a_norm_cannot_measure_it():
    model, data = flat(), list(torch.randn(17, 3).split(8))
    expected = statistics(recalibrate_batch_norm(copy.deepcopy(model), data[:2]))
    assert_same(statistics(recalibrate_batch_norm(copy.deepcopy(model), data)), expected)
    assert_same(statistics(recalibrate_batch_norm(model, data[::-1])), expected)
    maps = recalibrate_batch_norm(net(), torch.randn(3, 3, 2, 2).split(1))
    assert maps[2].num_batches_tracked == 3, "one image has values enough"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.ones(1, 3)] * 2, "every batch gave 1, 4 a single value"),
        ([torch.ones(8, 3), torch.ones(8, 5)], "mat1 and mat2"),
        (
            [torch.ones(8, 3), torch.full((8, 3), torch.nan)],
            "statistics of 1, 4 are not finite on these data; expected",
        ),
        ([torch.full((8, 3), torch.inf)], "statistics of 1, 4 are not finite"),
    ],
)
def test_an_error_leaves_the_statistics_as_they_were(data, message):
    model = flat()
    before = statistics(model)
    with pytest.raises((ValueError, RuntimeError), match=message):
        recalibrate_batch_norm(model, data)
    assert_same(statistics(model), before)
    assert [model[1].momentum, model[1].training, len(model[1]._forward_pre_hooks)] == [0.1, False, 0]


def test_an_error_of_the_distance_leaves_the_statistics_as_they_were():
    model, distances = flat(), iter([1.0])
    before = statistics(model)
    with pytest.raises(StopIteration):
        recalibrate_if_better(model, [torch.randn(8, 3)], lambda _: next(distances))
    assert_same(statistics(model), before)


def test_norms_that_are_not_called_keep_their_statistics():
    class WithAuxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.auxiliary = flat(), flat()

        def forward(self, x):
            return self.main(x)

    model = WithAuxiliary()
    before = statistics(model.auxiliary)
    recalibrate_batch_norm(model, [torch.randn(8, 3)])
    assert_same(statistics(model.auxiliary), before)
    assert model.main[1].num_batches_tracked == 1
