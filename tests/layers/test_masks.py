"""Removed weights stay zero, whatever trains the layer."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import bayesprune as bp
import bayesprune.layers
from bayesprune.layers import masks

OPTIMIZERS = {
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def net() -> nn.Module:
    return bp.to_variational(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    def closure():
        optimizer.zero_grad()
        loss = (model(torch.randn(5, 6)) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(count):
        optimizer.step(closure)


def assert_zeros_stay(model: nn.Module, sparsity: float = 0.5) -> None:
    for layer in (model[0], model[2]):
        mask = layer.weight_mask
        assert layer.weight[~mask].abs().max() == 0
        assert (layer.weight[mask] != 0).all()
    removed = sum(int((~layer.weight_mask).sum()) for layer in (model[0], model[2]))
    assert removed == round(sparsity * 72)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zeros_with_momentum_from_before(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    bp.prune_weights(model, "weights=0.5")
    assert_zeros_stay(model)
    before = model[0].weight.detach().clone()
    step(model, optimizer)
    assert not torch.equal(model[0].weight, before)
    assert_zeros_stay(model)


@pytest.mark.parametrize("name", ["sgd_momentum", "adamw", "adamw_fused"])
@pytest.mark.parametrize("attached", ["before", "after"])
def test_zeros_stay_zeros_when_attached(name, attached):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    if attached == "before":
        bp.attach(optimizer, model, num_data=50)
        step(model, optimizer)
        bp.prune_weights(model, "weights=0.5")
    else:
        step(model, optimizer)
        bp.prune_weights(model, "weights=0.5")
        bp.attach(optimizer, model, num_data=50)
    step(model, optimizer)
    assert_zeros_stay(model)


def foreign_step() -> None:
    """One of an optimizer of something else in the same process."""
    other = nn.Parameter(torch.zeros(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=0.1).step()


@pytest.mark.parametrize("end", ["detached", "thrown away"])
def test_an_attachment_keeps_the_zeros_in_place_of_the_hook_on_all_optimizers(end):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attachment = bp.attach(optimizer, model, num_data=50)
    bp.prune_weights(model, "weights=0.5")
    removed = ~model[0].weight_mask

    def disturb() -> None:
        with torch.no_grad():
            model[0].weight[removed] = 1.0

    disturb()
    foreign_step()
    assert (model[0].weight[removed] == 1).all(), "what is not its own it leaves alone"
    optimizer.step()
    assert_zeros_stay(model)
    if end == "detached":
        attachment.detach()
    else:
        del attachment, optimizer
        gc.collect()
    disturb()
    foreign_step()
    assert_zeros_stay(model)


def test_a_layer_that_two_optimizers_share_stays_with_the_hook_on_all():
    """An attachment to one of them would not see the steps of the other."""
    model = net()
    weights = torch.optim.SGD([model[0].weight, *model[2].parameters()], lr=0.1)
    biases = torch.optim.SGD([model[0].bias], lr=0.1)
    bp.prune_weights(model, "weights=0.5")
    for optimizer in (weights, biases):
        bp.attach(optimizer, model, num_data=50)
    for layer in (model[0], model[2]):
        layer.weight.data[~layer.weight_mask] = 1.0
    foreign_step()
    assert not model[0].weight[~model[0].weight_mask].any()
    assert model[2].weight[~model[2].weight_mask].all()


def test_the_attachment_that_comes_last_keeps_the_zeros():
    model = net()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    attachment = bp.attach(first, model, num_data=50)
    bp.prune_weights(model, "weights=0.5")
    bp.attach(second, model, num_data=50)
    attachment.detach()
    model[0].weight.data[~model[0].weight_mask] = 1.0
    foreign_step()
    assert model[0].weight[~model[0].weight_mask].all()
    second.step()
    assert_zeros_stay(model)


def test_zeros_stay_zeros_with_updates_by_hand():
    model = net()
    bp.prune_weights(model, "weights=0.5")
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * (parameter.grad + 0.01 * parameter)
    assert_zeros_stay(model)


@pytest.mark.parametrize("estimator", ["auto", "mean", "weight_sampling", "flipout", "local_reparameterization"])
def test_removed_weights_have_no_gradient(estimator):
    model = net()
    bp.prune_weights(model, "weights=0.5")
    with bp.sampling(model, estimator):
        model(torch.randn(5, 6)).square().sum().backward()
    for layer in (model[0], model[2]):
        assert layer.weight.grad[~layer.weight_mask].abs().max() == 0
        assert (layer.weight.grad[layer.weight_mask] != 0).any()
        if estimator != "mean":
            assert layer.weight_log_std.grad[~layer.weight_mask].abs().max() == 0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_their_zeros(again):
    model = net()
    bp.prune_weights(model, "weights=0.5")
    other = again(model)
    del model
    optimizer = OPTIMIZERS["sgd_momentum"](other.parameters())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    step(other, optimizer)
    assert_zeros_stay(other)


@pytest.mark.parametrize("assign", [False, True])
def test_a_reloaded_state_keeps_its_zeros(assign):
    model, other = net(), net()
    bp.prune_weights(model, "weights=0.5")
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    optimizer = OPTIMIZERS["adamw"](other.parameters())
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.ones_like(parameter),
            "exp_avg_sq": torch.ones_like(parameter),
        }
    step(other, optimizer)
    assert_zeros_stay(other)
    assert torch.equal(other[0].weight_mask, model[0].weight_mask)


def test_training_goes_on_after_the_stock_classes_are_back():
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step(model, optimizer)
    bp.prune_weights(model, "weights=0.5")
    step(model, optimizer)
    zeros = model[0].weight == 0
    bp.to_deterministic(model)
    assert torch.equal(model[0].weight == 0, zeros)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not torch.equal(model[0].weight == 0, zeros), "nothing keeps the zeros of a stock layer"


def test_a_second_mask_replaces_the_first():
    layer = bp.to_variational(nn.Linear(3, 2))
    layer.set_mask("weight", torch.tensor([[True, True, False], [True, True, True]]))
    layer.set_mask("weight", torch.tensor([[False, True, False], [True, True, True]]))
    assert (layer.weight == 0).tolist() == [[True, False, True], [False, False, False]]
    assert layer.masked_names() == ["weight"]
    assert [name for name, _ in layer.named_buffers()] == ["weight_mask"]


def test_layers_are_not_kept_alive():
    layer = bp.to_variational(nn.Linear(3, 2))
    layer.set_mask("weight", torch.ones(2, 3, dtype=torch.bool))
    gone = weakref.ref(layer)
    assert layer in masks._masked
    del layer
    gc.collect()
    assert gone() is None


class ScheduleFree(torch.optim.Optimizer):
    """SGD in the manner of schedule-free methods: `eval()` moves the weights to an average, `train()` back."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "steps": 0, "is_training": True})

    def eval(self):
        self._move(False, lambda beta: 1 - 1 / beta)

    def train(self):
        self._move(True, lambda beta: 1 - beta)

    @torch.no_grad()
    def step(self, closure):
        loss = torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    share = 1 / group["steps"]
                    p.lerp_(z, share).sub_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1) * -1)
                    z.sub_(p.grad, alpha=group["lr"])
        return loss

    @torch.no_grad()
    def _move(self, is_training, share):
        for group in self.param_groups:
            if group["is_training"] != is_training:
                group["is_training"] = is_training
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], share(group["beta"]))  # a version counter does not see it


class Attention(nn.Module):
    """Layers whose weights are read in a way of their own: torch's attention, and its encoder in one kernel."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = self.encoder(x)
        return self.attention(x, x, x, need_weights=False)[0]


MOVED = {"linear": (net, (5, 6)), "attention": (lambda: bp.to_variational(Attention()), (2, 3, 6))}


def of_zeros(model, x):
    """The output in eval mode of a copy whose removed weights are zeros, with nothing else in it."""
    with torch.no_grad():
        return bp.to_deterministic(copy.deepcopy(model)).eval()(x)


@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("case", MOVED)
def test_an_optimizer_that_moves_weights_outside_its_step(case, first):
    """Whatever it does between steps, in whatever order: evaluation, files and the stock layers have the zeros."""
    build, shape = MOVED[case]
    model = build().train()
    optimizer = ScheduleFree(model.parameters())
    x = torch.randn(shape)

    def closure():
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()

    for number in range(4):
        if number == 2:
            bp.prune_weights(model, "weights=0.5")
        optimizer.step(closure)
    for part in (model, optimizer) if first == "model" else (optimizer, model):
        part.eval()
    if case == "attention" and first == "model":
        model.eval()  # its kernel reads the raw weights of a whole block
    masked = [(layer, name) for _, layer in bp.layers.variational_layers(model) for name in layer.masked_names()]
    assert len(masked) >= 2
    with torch.no_grad():
        assert torch.equal(model(x), of_zeros(model, x))
    for name, value in model.state_dict().items():
        mask = model.state_dict().get(f"{name}_mask")
        assert mask is None or not value[~mask].any(), name
    optimizer.train()
    optimizer.eval()
    state = model.state_dict()
    assert all(not state[key.removesuffix("_mask")][~state[key]].any() for key in state if key.endswith("_mask"))


@pytest.mark.parametrize("how", ["swapped in", "averaged", "an older state"])
def test_weights_that_are_written_over(how):
    """By an exponential average's store and restore, by torch's own average, by a state from before the removal."""
    model = net()
    optimizer = OPTIMIZERS["sgd_momentum"](model.parameters())
    x = torch.randn(5, 6)
    bp.prune.make_masks(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    average.update_parameters(model)
    step(model, optimizer)
    bp.prune_weights(model, "weights=0.5")
    model.eval()
    if how == "swapped in":
        for name, parameter in model.named_parameters():
            parameter.data.copy_(old[name])
    elif how == "averaged":
        average.module.eval()
        average.update_parameters(model)
        model = average.module
        assert model[0].weight[~model[0].weight_mask].any(), "it is an average with what was there"
    else:
        model.load_state_dict({name: value for name, value in old.items() if not name.endswith("_mask")}, strict=False)
    with torch.no_grad():
        found = model(x)
    assert_zeros_stay(model)
    assert torch.equal(found, of_zeros(model, x))


class Slow:
    """Slow weights in the manner of Lookahead, mixed in after the step that all hooks see; no optimizer of torch."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.slow = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self, closure):
        torch.enable_grad()(self.optimizer.step)(closure)
        for p, slow in self.slow.items():
            p.copy_(slow.lerp_(p, 0.5))


def test_slow_weights_do_not_bring_removed_ones_back():
    model = net()
    optimizer = Slow(OPTIMIZERS["sgd_momentum"](model.parameters()))
    step(model, optimizer)
    bp.prune_weights(model, "weights=0.5")
    step(model, optimizer)
    assert model[0].weight[~model[0].weight_mask].any(), "they are mixed in"
    model.eval()
    step(model, optimizer, 1)
    x = torch.randn(5, 6)
    assert torch.equal(model(x), of_zeros(model, x))
    assert_zeros_stay(model)


def test_evaluation_without_removed_weights_writes_nothing():
    model = net().eval()
    before = [parameter._version for parameter in model.parameters()]
    model(torch.randn(5, 6))
    assert [parameter._version for parameter in model.parameters()] == before
