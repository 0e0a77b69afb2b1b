"""What layers draw at the start of a forward of their model is what each would draw when it asks."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bayesprune as bp
from bayesprune import estimators
from bayesprune.foundation import device
from bayesprune.layers import joint_draws
from tests.cases import structures


class Net(nn.Module):
    """Convolutions, attention, a linear layer, one of two shapes and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, bias=False)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.twice = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        x = self.conv(x).relu().flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.twice(self.twice(x).relu())).mean(1)


def attached(std="per_weight", **options):
    torch.manual_seed(0)
    model = bp.to_variational(Net(), std=std, estimator="weight_sampling")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return model, optimizer, bp.attach(optimizer, model, num_data=100, **options)


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def gradients(model, run=None, seed=7):
    torch.manual_seed(seed)
    model.zero_grad()
    output = (model if run is None else run)(X)
    output.square().sum().backward()
    return [output, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_close(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


@pytest.fixture(params=["processor", "launched"])
def paths(request, monkeypatch):
    """The paths of a processor, and those of devices on which kernels are launched."""
    if request.param == "launched":
        monkeypatch.setattr(device, "CHEAP_CALLS", set())
    return request.param


def counted_draws(monkeypatch):
    """How many tensors each call of `sample_together` by the hook draws."""
    calls = []

    def sample_together(posteriors, seeds):
        calls.append(len(posteriors))
        return sample(posteriors, seeds)

    sample = estimators.sample_together
    monkeypatch.setattr(joint_draws.estimators, "sample_together", sample_together)
    return calls


@structures
def test_what_is_drawn_ahead_is_what_is_drawn_when_asked_for(std, paths, monkeypatch):
    model, *_ = attached(std)
    calls = counted_draws(monkeypatch)
    first = gradients(model)
    assert not calls, "nothing was asked for before"
    second = gradients(model)
    assert sum(calls) == 11, "each parameter that is used, as often as it is"
    assert_close(second, first)
    assert not torch.equal(first[0], gradients(model, seed=8)[0])


@structures
def test_a_model_with_an_attachment_draws_what_one_without_draws(std, paths):
    model, _, attachment = attached(std)
    found = [gradients(model) for _ in range(2)]
    attachment.detach()
    expected = gradients(model)
    assert_close(found[0], expected)
    assert_close(found[1], expected)


@structures
def test_both_paths_draw_the_same(std, monkeypatch):
    model, *_ = attached(std)
    gradients(model)
    on_processor = gradients(model)
    monkeypatch.setattr(device, "CHEAP_CALLS", set())
    assert_close(gradients(model), on_processor)


def test_a_large_network_is_drawn_in_blocks(paths):
    torch.manual_seed(0)
    model = bp.to_variational(nn.Sequential(nn.Linear(108, 900), nn.Linear(900, 600)), std="per_channel")
    bp.attach(torch.optim.SGD(model.parameters(), lr=0.0), model, num_data=100)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        model.zero_grad()
        with bp.sampling(model, "weight_sampling"):
            model(X.view(4, -1)).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_gradients_are_those_of_the_plain_path(paths):
    """With one tensor the noise is that of the seed, by whatever path."""
    for std in ("per_weight", "per_channel", "rank_one"):
        torch.manual_seed(0)
        layer = bp.to_variational(nn.Linear(6, 5), std=std)
        posteriors = [layer.posterior("weight"), layer.posterior("bias")]
        draws = estimators.sample_together(posteriors, [11, 12])
        of_draws = [torch.randn_like(draw) for draw in draws]
        found = torch.autograd.grad(draws, list(layer.parameters()), of_draws)
        eps = [(draw - p.mean) / estimators.as_gaussian(p).std for draw, p in zip(draws, posteriors, strict=True)]
        plain = [p.mean + estimators.as_gaussian(p).std * e.detach() for p, e in zip(posteriors, eps, strict=True)]
        assert_close(found, torch.autograd.grad(plain, list(layer.parameters()), of_draws))


def test_several_forwards_before_a_backward(paths):
    model, *_ = attached()
    gradients(model)
    torch.manual_seed(5)
    model.zero_grad()
    (model(X).square().sum() + model(2 * X).square().sum()).backward()
    together = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    torch.manual_seed(5)
    model.zero_grad()
    for x in (X, 2 * X):
        model(x).square().sum().backward()
    assert_close([p.grad for p in model.parameters() if p.grad is not None], together)


class Checkpointed(nn.Module):
    """A layer that runs once more in the backward pass."""

    def __init__(self, inner, use_reentrant):
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_meet_the_same_weights(use_reentrant, paths):
    """The part that runs twice draws on its own, from the stream that is restored for it."""
    model, *_ = attached()
    inner, met = model.twice, []
    draw = inner.draw
    inner.draw = lambda name: met.append(draw(name)) or met[-1]
    model.twice = Checkpointed(inner, use_reentrant)
    for _ in range(2):
        met.clear()
        torch.manual_seed(3)
        (model(X).square().sum() + model(2 * X).square().sum()).backward()
        forward, again = met[:8:2], met[8::2]  # the weights of four calls, met again from the last on
        assert all(map(torch.equal, forward, reversed(again)))
        assert len({float(weight.detach().sum()) for weight in forward}) == 4


class Noisy(nn.Module):
    """Dropout takes numbers from the stream between layers; one layer has local noise, with a seed of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.local, self.second = nn.Linear(108, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.dropout, self.last = nn.Dropout(0.3), nn.Linear(16, 3)

    def forward(self, x):
        x = self.second(self.local(self.first(x.flatten(1)).relu()).relu()).relu()
        return self.last(self.dropout(x))


def noisy():
    torch.manual_seed(0)
    model = bp.to_variational(Noisy(), std="per_channel", estimator="weight_sampling")
    model.local.estimator = "local_reparameterization"
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    return model, optimizer, bp.attach(optimizer, model, num_data=100)


def steps(model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()


def test_where_dropout_shares_the_stream_only_what_comes_before_is_drawn_ahead(monkeypatch):
    model, *_ = noisy()
    calls, asked = counted_draws(monkeypatch), []
    for _ in range(4):
        gradients(model)
        asked.append(sum(calls))
    assert asked == [0, 4, 8, 12]
    model.dropout.p = 0.0
    for _ in range(2):
        gradients(model)
        asked.append(sum(calls))
    assert asked[4:] == [16, 22], "what is found to be drawn in order again is drawn ahead again"


def test_a_run_with_dropout_resumes_to_the_last_bit(paths):
    """A state that is saved after any step, with one of torch's generator, goes on as if nothing had been between."""
    model, optimizer, attachment = noisy()
    steps(model, optimizer, 3)
    state = copy.deepcopy([o.state_dict() for o in (model, optimizer, attachment)]), torch.get_rng_state()
    steps(model, optimizer, 3)
    ahead = attachment.state_dict()["ahead"]
    assert ahead["draws"] == ["first.weight", "first.bias", "", "second.weight", "second.bias"]
    assert ahead["squares"] == (["local.weight_log_std", "local.bias_log_std"] if paths == "launched" else [])
    resumed = noisy()
    for one, of_one in zip(resumed, state[0], strict=True):
        one.load_state_dict(of_one)
    torch.set_rng_state(state[1])
    steps(*resumed[:2], 3)
    for one, other in zip(model.parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_without_the_plan_resumes_to_the_last_bit_on_a_processor():
    model, optimizer, attachment = noisy()
    steps(model, optimizer, 3)
    state = copy.deepcopy([o.state_dict() for o in (model, optimizer, attachment)]), torch.get_rng_state()
    steps(model, optimizer, 3)
    resumed = noisy()
    for one, of_one in zip(resumed, state[0], strict=True):
        one.load_state_dict({k: v for k, v in of_one.items() if k != "ahead"})
    torch.set_rng_state(state[1])
    steps(*resumed[:2], 3)
    for one, other in zip(model.parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_layer_in_evaluation_mode_moves_no_other_draw():
    """Frozen layers in evaluation mode take no seed: those after them are still drawn ahead."""
    model, _, attachment = attached()
    gradients(model)
    model.twice.eval()
    ahead = gradients(model)
    attachment.detach()
    assert_close(gradients(model), ahead)


def test_a_checkpointed_part_changes_no_draw(paths):
    plain, *_ = attached()
    model, *_ = attached()
    model.twice = Checkpointed(model.twice, use_reentrant=False)
    for _ in range(3):
        assert_close(gradients(model), gradients(plain))


def test_a_changed_weight_is_drawn_anew(paths):
    """Something in the forward sets a weight that was drawn from already."""
    model, *_ = attached()
    gradients(model)

    def clear(layer, args):
        with torch.no_grad():
            layer.weight.zero_()

    model.head.register_forward_pre_hook(clear)
    model.head.bias.data.fill_(1)
    for std in (model.head.weight_log_std, model.head.bias_log_std):
        std.data.fill_(-30)
    torch.testing.assert_close(model(X), torch.ones(4, 5))


def test_other_forwards_are_as_without(paths):
    """Evaluation, no gradients, an own forward of a part, and a state that begins within one."""
    model, *_ = attached()
    gradients(model)
    model.eval()
    assert torch.equal(model(X), model(X))
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(X), model(X))
    assert not torch.equal(model.twice(torch.ones(1, 16)), model.twice(torch.ones(1, 16)))
    assert joint_draws._RUNNING.draws is None


def test_a_forward_that_fails_leaves_nothing_behind(paths):
    model, *_ = attached()
    gradients(model)
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 5, 6, 6))
    assert joint_draws._RUNNING.draws is None
    assert_close(gradients(model), gradients(model))


def test_copies_and_pickles_draw_for_themselves(paths):
    model, *_ = attached()
    expected = gradients(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(gradients(other), expected)
        assert_close(gradients(other), expected)
        hooks = [hook.__self__ for hook in other._forward_hooks.values()]
        assert all(parameter.layer in set(other.modules()) for parameter in hooks[0]._parameters.values())


def test_detach_and_conversion_back_remove_the_hooks():
    for end in (lambda model, attachment: attachment.detach(), lambda model, attachment: bp.to_deterministic(model)):
        model, _, attachment = attached()
        gradients(model)
        end(model, attachment)
        gradients(model)
        assert not model._forward_hooks
        assert not model._forward_pre_hooks


def test_second_derivatives(paths):
    torch.manual_seed(0)
    model = bp.to_variational(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), std="per_channel")
    layers = [layer for layer in model if hasattr(layer, "estimator")]
    for layer in layers:
        layer.estimator = "weight_sampling"
    x, found = torch.randn(4, 6), []
    for attach in (False, True, True):
        if attach and not model._forward_hooks:
            bp.attach(torch.optim.SGD(model.parameters(), lr=0.0), model, num_data=100)
        for seed in (2, 3):
            torch.manual_seed(seed)
            (gradient,) = torch.autograd.grad(model(x).tanh().sum(), model[0].weight, create_graph=True)
        second = torch.autograd.grad(gradient.square().sum(), [layer.weight_log_std for layer in layers])
        found.append(second)
    assert_close(found[2], found[1])
    assert all(one.isfinite().all() and one.any() for one in found[1])
