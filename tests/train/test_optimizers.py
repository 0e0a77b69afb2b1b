"""The KL is counted once and the stds move once, whoever takes the steps; where they would not, a sentence says so."""

import copy
import warnings

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune import gates
from bayesprune.errors import UnsupportedModelError
from bayesprune.layers import named_posteriors
from bayesprune.train.kl import bind_prior
from tests.oracles import HandMadeAdam
from tests.train.reference import (
    NUM_DATA,
    OPTIMIZERS,
    assert_same_parameters,
    batches,
    losses,
    net,
    optimizers,
    others_of,
    stds_of,
    train,
    train_on_elbo,
)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation with an optimizer inside, which alone takes the steps."""

    def __init__(self, params, base_optimizer, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            self.state[p]["before"] = p.data.clone()
            p.add_(p.grad, alpha=0.05 / float(norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p, state in self.state.items():
            p.data = state["before"]
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure):
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


def sam_on_elbo(model):
    """The same by hand: the gradient of the loss a step uphill, that of the KL where the weights are."""
    bound, stds, others = bind_prior(model, bp.priors.Gaussian()), stds_of(model), others_of(model)
    adams = {name: HandMadeAdam(1e-2) for name in stds}
    every = {**others, **stds}
    torch.manual_seed(2)
    for batch in batches():
        start = {name: p.detach().clone() for name, p in every.items()}
        first = torch.autograd.grad(sum(losses(model, batch, 1)), list(every.values()))
        norm = torch.stack([gradient.norm() for gradient in first]).norm()
        with torch.no_grad():
            for p, gradient in zip(every.values(), first, strict=True):
                p += 0.05 / float(norm) * gradient
        second = torch.autograd.grad(sum(losses(model, batch, 1)), list(every.values()))
        with torch.no_grad():
            for name, p in every.items():
                p.copy_(start[name])
        kl = 0.1 / NUM_DATA * sum(prior.kl(p.mean, p.log_std) for p, prior in bound.items())
        of_kl = torch.autograd.grad(kl, list(every.values()), allow_unused=True)
        with torch.no_grad():
            for (name, p), a, b in zip(every.items(), second, of_kl, strict=True):
                gradient = a if b is None else a + b
                p.copy_(adams[name].moved(p, gradient) if name in stds else p - 0.05 * gradient)


@pytest.mark.parametrize("how", ["two steps", "closure"])
def test_sam(how):
    """Its own step is never called, or moves weights before it; the one inside takes the steps."""
    model = net()
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.05)
    attachment = bp.attach(optimizer, model, num_data=NUM_DATA)
    torch.manual_seed(2)
    for batch in batches():

        def backward(batch=batch):
            (loss,) = losses(model, batch, 1)
            loss.backward()

        backward()
        if how == "closure":
            optimizer.step(backward)
        else:
            optimizer.first_step()
            backward()
            optimizer.second_step()
    assert attachment.step == 4
    sam_on_elbo(expected)
    assert_same_parameters(model, expected, start)


def split(model, make, *, stds_with="means"):
    """Optimizers of the matrices and kernels, and of the rest, as Muon is used with AdamW."""
    groups = [], []
    for name, parameter in model.named_parameters():
        if stds_with == "means" or not name.endswith("log_std"):
            groups[parameter.dim() <= 1].append(parameter)
        elif stds_with == "others":
            groups[parameter.dim() > 1].append(parameter)
    return [make(group) for group in groups]


@pytest.mark.parametrize("stds_with", ["means", "others", "none"])
@optimizers
def test_two_optimizers_with_an_attachment_each(name, stds_with):
    """However the stds are spread, each is moved once, by the attachment of its mean; one optimizer or two is one."""
    model = net()
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    pair = split(model, OPTIMIZERS[name], stds_with=stds_with)
    attachments = [bp.attach(optimizer, model, num_data=NUM_DATA) for optimizer in pair]
    total = bp.kl_divergence(model)
    torch.testing.assert_close(sum(a.kl_divergence() for a in attachments), total, rtol=1e-12, atol=0)
    torch.manual_seed(2)
    for batch in batches():
        for optimizer in pair:
            optimizer.zero_grad()
        (loss,) = losses(model, batch, 1)
        loss.backward()
        pair[0].step()
        pair[0].zero_grad()  # leaves the other's gradients alone
        pair[1].step()
    assert [attachment.step for attachment in attachments] == [4, 4]
    train_on_elbo(expected, OPTIMIZERS[name])
    assert_same_parameters(model, expected, start)


@pytest.mark.parametrize("stds_with", ["means", "others", "none"])
def test_detached_optimizers_are_as_they_were(stds_with):
    model = net()
    pair = split(model, torch.optim.SGD, stds_with=stds_with)
    before = [[id(p) for p in optimizer.param_groups[0]["params"]] for optimizer in pair]
    attachments = [bp.attach(optimizer, model, num_data=NUM_DATA) for optimizer in pair]
    for attachment in attachments:
        attachment.detach()
    assert [[id(p) for p in optimizer.param_groups[0]["params"]] for optimizer in pair] == before


def test_names_of_parameters_stay_with_them():
    model = net()
    stds = {id(part) for posterior in named_posteriors(model) for part in posterior.log_std_parts}
    rest = [(name, p) for name, p in model.named_parameters() if name == "0.weight" or id(p) in stds]
    first = torch.optim.SGD(model.named_parameters(), lr=0.1)
    second = torch.optim.SGD(rest, lr=0.1)
    if "param_names" not in first.param_groups[0]:
        pytest.skip("this torch gives optimizers no names")
    before = [copy.deepcopy(optimizer.param_groups[0]["param_names"]) for optimizer in (first, second)]
    attachments = [bp.attach(optimizer, model, num_data=NUM_DATA) for optimizer in (first, second)]
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in (first, second):
        (group,) = optimizer.param_groups
        assert [named[id(parameter)] for parameter in group["params"]] == group["param_names"]
    first.load_state_dict(first.state_dict())
    for attachment in attachments:
        attachment.detach()
    assert [optimizer.param_groups[0]["param_names"] for optimizer in (first, second)] == before
    alone = torch.optim.SGD([("weight", model[0].weight)], lr=0.1)
    bp.attach(alone, model, num_data=NUM_DATA)
    (group,) = alone.param_groups
    assert len(set(group["param_names"])) == len(group["params"]) > 1


def test_two_players_in_one_model():
    """As a generator and a critic: a backward through both, a step of one; what the other gets is thrown away."""
    torch.manual_seed(0)
    model = bp.to_variational(nn.ModuleDict({"maker": nn.Linear(3, 4), "critic": nn.Linear(4, 1)}))
    expected = copy.deepcopy(model)
    runs = []
    for each in (model, expected):
        players = list(each.values())
        pair = [torch.optim.SGD(player.parameters(), lr=0.05) for player in players]
        for optimizer, player in zip(pair, players, strict=True):
            bp.attach(optimizer, each if each is model else player, num_data=5)
        torch.manual_seed(1)
        for number in range(40):
            for optimizer in pair:
                optimizer.zero_grad()
            each["critic"](each["maker"](torch.randn(8, 3))).square().mean().backward()
            pair[number % 4 == 0].step()
        runs.append(each.state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_two_optimizers_resume():
    def build():
        model = net()
        pair = split(model, OPTIMIZERS["adamw"])
        return model, pair, [bp.attach(optimizer, model, num_data=NUM_DATA) for optimizer in pair]

    def run(model, pair):
        torch.manual_seed(2)
        for batch in batches():
            model.zero_grad()
            next(iter(losses(model, batch, 1))).backward()
            for optimizer in pair:
                optimizer.step()

    model, pair, attachments = build()
    run(model, pair)
    state = copy.deepcopy([part.state_dict() for part in (model, *pair, *attachments)])
    other, others, again = build()
    for part, saved in zip((other, *others, *again), state, strict=True):
        part.load_state_dict(saved)
    for each, optimizers_ in ((model, pair), (other, others)):
        run(each, optimizers_)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    single = net()
    alone = bp.attach(torch.optim.SGD(single.parameters()), single, num_data=NUM_DATA)
    with pytest.raises(ValueError, match="moments of 3 stds, and it trains 5; expected the optimizers of the run"):
        alone.load_state_dict(attachments[0].state_dict())


def test_another_optimizer_takes_over():
    """The one before may stay as it is; a step of it with the same means is no longer one on the ELBO."""
    model = net()
    first = OPTIMIZERS["sgd"](model.parameters())
    before = bp.attach(first, model, num_data=NUM_DATA)
    train(model, first)
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    second = OPTIMIZERS["adamw"](model.parameters())
    bp.attach(second, model, num_data=NUM_DATA)
    train(model, second)
    train_on_elbo(expected, OPTIMIZERS["adamw"])
    assert_same_parameters(model, expected, start)
    assert before.kl_divergence() == 0
    with pytest.raises(RuntimeError, match=r"SGD takes a step with 0.weight, to which another optimizer was attached"):
        first.step()


def test_gates_have_one_optimizer():
    model = bp.to_variational(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    gates.add_weight_gates(model)
    parts = [torch.optim.SGD(model[index].parameters(), lr=0.1) for index in (0, 2)]
    bp.attach(parts[0], model, num_data=1)
    with pytest.raises(ValueError, match="expected one optimizer for a model with gates"):
        bp.attach(parts[1], model, num_data=1)
    bp.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, num_data=1)


class Logged(torch.optim.AdamW):
    """A step of one's own around that of torch, whose hooks then run twice; it clips in between."""

    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            nn.utils.clip_grad_value_(group["params"], 1e6)
        super().step()
        return loss


class UnsavedStr(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


NESTED = {
    "logged": (lambda p: Logged(p, lr=0.01, weight_decay=0.0), "adamw"),
    "passing": (lambda p: UnsavedStr(p, lr=0.05), "sgd"),
}


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("name", NESTED)
def test_a_step_inside_a_step_counts_once(name, with_closure):
    make, plain = NESTED[name]
    torch.optim.AdamW([torch.zeros(1)])  # torch hooks a class when the first of its kind is made
    torch.optim.SGD([torch.zeros(1)])
    model = net()
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = make(model.parameters())
    attachment = bp.attach(optimizer, model, num_data=NUM_DATA, num_steps=4, warmup=0.75)
    torch.manual_seed(2)
    for batch in batches():

        def closure(batch=batch):
            optimizer.zero_grad()
            (loss,) = losses(model, batch, 1)
            loss.backward()
            return loss

        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert attachment.step == 4
    train_on_elbo(expected, OPTIMIZERS[plain], warmup=0.75)
    assert_same_parameters(model, expected, start)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_two_steps_on_one_gradient_are_two_steps_on_one_gradient(mode):
    """As if the KL were in the loss: the gradient has it already."""
    model, expected = net(), net()
    (x, y), *_ = batches(1)
    rates = {"once": 0.1, "twice": 0.05}
    for each, times in ((expected, "once"), (model, "twice")):
        getattr(each, mode)()
        optimizer = torch.optim.SGD(each.parameters(), lr=rates[times])
        attachment = bp.attach(optimizer, each, num_data=NUM_DATA)
        torch.manual_seed(0)
        nn.functional.cross_entropy(each(x), y).backward()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not come from a draw")
            for _ in range(1 if times == "once" else 2):
                optimizer.step()
        assert attachment.step == 1
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_a_closure_that_is_called_twice_is_refused():
    class Twice(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure):
            closure()
            closure()

    model = net()
    optimizer = Twice(model.parameters())
    bp.attach(optimizer, model, num_data=NUM_DATA)
    with pytest.raises(RuntimeError, match="Twice called its closure a second time in one step"):
        optimizer.step(lambda: next(iter(losses(model, batches(1)[0], 1))).backward())


class Unhooked(torch.optim.Optimizer):
    """A wrapper that keeps what it wraps under a name of its own."""

    def __init__(self, inner):
        self.wrapped, self.param_groups = inner, inner.param_groups

    step = None


class Wrapper(Unhooked):
    """One that keeps it under the name that accelerate uses."""

    def __init__(self, inner):
        super().__init__(inner)
        self.optimizer = inner


class TwoSteps(torch.optim.SGD):
    def first_step(self):
        pass

    def second_step(self):
        pass


class LayerWiseDummyOptimizer(torch.optim.SGD):
    """The name of what transformers makes for steps during backward."""


def test_what_attach_is_given_by_mistake():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for arguments, error, message in (
        (
            (model, optimizer),
            TypeError,
            r"a Sequential and a SGD; expected the optimizer first: attach\(optimizer, m",
        ),
        ((model, model), TypeError, "expected the optimizer first"),
        ((optimizer, model.parameters()), TypeError, "got a generator as model; expected a torch module"),
        (([optimizer], model), TypeError, "got a list as optimizer; .* attach to each of them"),
        ((optimizer, nn.DataParallel(model)), UnsupportedModelError, "got DataParallel, which copies"),
        ((TwoSteps(model.parameters()), model), UnsupportedModelError, "TwoSteps, which is stepped by first_step"),
        ((Unhooked(optimizer), model), UnsupportedModelError, r"Unhooked, whose step\(\) runs no hooks"),
        ((LayerWiseDummyOptimizer(model.parameters()), model), UnsupportedModelError, "moves weights during backward"),
        (
            (Wrapper(torch.optim.LBFGS(model.parameters())), model),
            UnsupportedModelError,
            "LBFGS, .* several times",
        ),
    ):
        with pytest.raises(error, match=message):
            bp.attach(*arguments, num_data=1)
    assert not optimizer._optimizer_step_pre_hooks
