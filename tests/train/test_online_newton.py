import copy

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, multiprocessing, nn

import bayesprune as bp
from bayesprune.train import OnlineNewton

NUM_DATA = 50


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batches(count: int, size: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, dtype=torch.float64, generator=generator), torch.arange(size) % 2) for _ in range(count)
    ]


def groups(model: nn.Module) -> list[dict]:
    return [
        {"params": model[0].parameters(), "weight_decay": 0.03, "clip_radius": 0.02},
        {"params": model[2].parameters(), "lr": 0.2, "betas": (0.7, 0.6), "num_data": 500, "rescale_lr": False},
    ]


def optimizer_of(model: nn.Module) -> OnlineNewton:
    return OnlineNewton(groups(model), 0.3, num_data=NUM_DATA, hessian_init=0.5, betas=(0.8, 0.9), weight_decay=0.01)


def train(model, optimizer, data, *, draws=1, sampled_model=None):
    for x, y in data:
        optimizer.zero_grad()
        for _ in range(draws):
            with optimizer.sampled(model if sampled_model is None else sampled_model):
                (F.cross_entropy(model(x), y) / draws).backward()
        optimizer.step()


class ByTheBook:
    """Algorithm 1 of Shen et al. for one parameter, line by line; several draws a step are averaged."""

    def __init__(self, mean, *, lr, ess, h0, beta1, beta2, delta, radius, rescale):
        self.mean, self.g, self.h, self.t = mean.clone(), torch.zeros_like(mean), torch.full_like(mean, h0), 0
        self.alpha = lr * (h0 + delta) if rescale else lr
        self.ess, self.beta1, self.beta2, self.delta, self.radius = ess, beta1, beta2, delta, radius

    def sigma(self):
        return 1 / torch.sqrt(self.ess * (self.h + self.delta))

    def step(self, gradients, noises):
        self.t += 1
        sigma = self.sigma()
        count = len(gradients)
        g_hat = sum(gradients) / count
        h_hat = sum(g * (sigma * eps) / sigma**2 for g, eps in zip(gradients, noises, strict=True)) / count
        b1, b2, d = self.beta1, self.beta2, self.delta
        self.g = b1 * self.g + (1 - b1) * g_hat
        self.h = b2 * self.h + (1 - b2) * h_hat + 0.5 * (1 - b2) ** 2 * (self.h - h_hat) ** 2 / (self.h + d)
        g_bar = self.g / (1 - b1**self.t)
        move = (g_bar + d * self.mean) / (self.h + d)
        self.mean = self.mean - self.alpha * move.clamp(-self.radius, self.radius)


@pytest.mark.parametrize("draws", [1, 3])
def test_steps_are_those_of_the_paper(draws):
    model = net()
    common = {"ess": NUM_DATA, "h0": 0.5, "beta1": 0.8, "beta2": 0.9, "delta": 0.01, "lr": 0.3, "radius": float("inf")}
    first = common | {"delta": 0.03, "radius": 0.02, "rescale": True}
    second = common | {"lr": 0.2, "beta1": 0.7, "beta2": 0.6, "ess": 500, "rescale": False}
    books = [ByTheBook(p.detach(), **(first if i < 2 else second)) for i, p in enumerate(model.parameters())]
    slow = copy.deepcopy(model)
    torch.manual_seed(2)
    for x, y in batches(6):
        gradients, noises = [], []
        for _ in range(draws):
            noises.append([torch.randn_like(book.mean) for book in books])
            drawn = [book.mean + book.sigma() * eps for book, eps in zip(books, noises[-1], strict=True)]
            nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(drawn), slow.parameters())
            gradients.append(torch.autograd.grad(F.cross_entropy(slow(x), y), list(slow.parameters())))
        for book, gs, eps in zip(books, zip(*gradients, strict=True), zip(*noises, strict=True), strict=True):
            book.step(gs, eps)
    optimizer = optimizer_of(model)
    torch.manual_seed(2)
    train(model, optimizer, batches(6), draws=draws)
    for parameter, book in zip(model.parameters(), books, strict=True):
        torch.testing.assert_close(parameter.detach(), book.mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(optimizer.precision(parameter), book.sigma() ** -2, rtol=1e-9, atol=0)


def test_it_finds_the_posterior_of_a_linear_gaussian_model():
    """Mean: the ridge solution; std: 1 / sqrt of the Hessian's diagonal; within 3 %, on average over 64 outputs."""
    num_data, num_outputs, decay, num_steps = 200, 64, 0.05, 800
    mixing = torch.tensor([[1.0, 0.5, 0, 0], [0, 2.0, 0, 0], [0, 0, 0.5, 0.3], [0, 0, 0, 1.0]], dtype=torch.float64)
    x = torch.randn(num_data, 4, dtype=torch.float64) @ mixing
    y = x @ torch.tensor([[1.0], [-0.5], [2.0], [0.0]], dtype=torch.float64) + torch.randn(num_data, 1).double()
    hessian = x.T @ x + num_data * decay * torch.eye(4)
    mean, std = torch.linalg.solve(hessian, x.T @ y)[:, 0], hessian.diagonal().rsqrt()

    model = nn.Linear(4, num_outputs, bias=False).double()
    optimizer = OnlineNewton(model.parameters(), 0.2, num_data=num_data, betas=(0.9, 0.99), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        with optimizer.sampled(model):
            (0.5 * (model(x) - y).square().mean(0).sum()).backward()
        optimizer.step()
        schedule.step()
    off = optimizer.precision(model.weight).mean(0).rsqrt() / std - 1
    assert off.abs().max() < 0.03, f"std off by {off}"
    off = (model.weight.mean(0) - mean) / std
    assert off.abs().max() < 0.03, f"mean off by {off} stds"


def test_a_draw_has_the_posteriors_std_and_leaves_no_trace():
    model = net()
    optimizer = optimizer_of(model)
    train(model, optimizer, batches(3))
    before = copy.deepcopy(model.state_dict())
    draws = []
    for _ in range(1000):
        with torch.no_grad(), optimizer.sampled(model):
            draws.append(model[0].weight.clone())
    z = (torch.stack(draws).var(0) * optimizer.precision(model[0].weight) - 1) * (999 / 2) ** 0.5
    assert z.abs().max() < 5, f"z = {z.abs().max():.1f}"
    with pytest.raises(KeyError), optimizer.sampled(model):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_resume_is_exact():
    model, whole, resumed = net(), net(), net()
    optimizer, other = optimizer_of(model), optimizer_of(whole)
    torch.manual_seed(3)
    train(whole, other, batches(6))
    torch.manual_seed(3)
    train(model, optimizer, batches(6)[:3])
    resumed.load_state_dict(model.state_dict())
    again = optimizer_of(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, again, batches(6)[3:])
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(again.precision(a), other.precision(b))


def test_zeroed_gradients_take_their_curvatures_along():
    model, clean = net(), net()
    optimizer, other = optimizer_of(model), optimizer_of(clean)
    (x, y), *rest = batches(3)
    for zero in (lambda: optimizer.zero_grad(set_to_none=False), optimizer.zero_grad, model.zero_grad):
        with optimizer.sampled(model):
            F.cross_entropy(model(x), y).backward()
        zero()
    torch.manual_seed(4)
    for x, y in rest:
        with optimizer.sampled(model):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        model.zero_grad()
    torch.manual_seed(4)

    def closure(x, y):
        with other.sampled(clean):  # zeroed inside the draw, too
            other.zero_grad()
            loss = F.cross_entropy(clean(x), y)
            loss.backward()
        return loss

    assert all(other.step(lambda x=x, y=y: closure(x, y)) > 0 for x, y in rest)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), clean.parameters(), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_a_variational_model_draws_once_and_keeps_what_was_removed(training):
    model = net()
    optimizer = OnlineNewton(model.parameters(), 0.1, num_data=NUM_DATA, betas=(0.9, 0.9))
    train(model, optimizer, batches(2))
    means = list(model.parameters())
    bp.to_variational(model, relative_std=3.0).train(training)
    optimizer.add_param_group(
        {"params": [part for part in model.parameters() if part.dim() and part not in set(means)]}
    )
    assert all(any(p is mean for p in model.parameters()) for mean in means)
    bp.laplace.online_newton_posterior(model, optimizer)
    bp.prune_weights(model, "weights=0.5")
    removed = [~layer.weight_mask for layer in (model[0], model[2])]
    stds = {name: p.clone() for name, p in model.named_parameters() if name.endswith("log_std")}
    x, _ = batches(1)[0]
    with torch.no_grad(), optimizer.sampled(model):
        assert torch.equal(model(x), model(x))
        assert not any(layer.weight[cut].any() for layer, cut in zip((model[0], model[2]), removed, strict=True))
        assert all(torch.equal(p, stds[name]) for name, p in model.named_parameters() if name in stds)
    kept = model[0].weight[~removed[0]].clone()
    train(model, optimizer, batches(4))
    assert not any(layer.weight[cut].any() for layer, cut in zip((model[0], model[2]), removed, strict=True))
    assert all(torch.equal(p, stds[name]) for name, p in model.named_parameters() if name in stds)
    assert not torch.equal(model[0].weight[~removed[0]], kept)
    assert all(p.isfinite().all() for p in model.parameters())


def run_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(net())
    optimizer = OnlineNewton(model.parameters(), 0.1, num_data=NUM_DATA, betas=(0.9, 0.9))
    torch.manual_seed(rank)
    train(model, optimizer, [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in batches(4)])
    results = {name: (p.detach(), optimizer.precision(p)) for name, p in model.module.named_parameters()}
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_take_the_step_of_one(tmp_path, monkeypatch):
    multiprocessing.spawn(run_process, (str(tmp_path),), nprocs=2)
    model = net()
    optimizer = OnlineNewton(model.parameters(), 0.1, num_data=NUM_DATA, betas=(0.9, 0.9))
    torch.manual_seed(0)

    def as_first_process(device):
        return torch.Generator(device).manual_seed(int(torch.empty((), dtype=torch.int64).random_()))

    monkeypatch.setattr("bayesprune.train.online_newton._shared_generator", as_first_process)
    train(model, optimizer, batches(4))
    for rank in range(2):
        for name, found in torch.load(tmp_path / f"{rank}.pt").items():
            parameter = model.get_parameter(name)
            torch.testing.assert_close(
                found, (parameter.detach(), optimizer.precision(parameter)), rtol=1e-12, atol=1e-12
            )


def test_frozen_and_unused_parameters_stay():
    model = net()
    model[0].weight.requires_grad_(False)
    extra = nn.Parameter(torch.ones(2))
    before = model[0].weight.clone()
    optimizer = OnlineNewton([*model.parameters(), extra], 0.1, num_data=NUM_DATA)
    with optimizer.sampled(model):
        assert torch.equal(model[0].weight, before)
    train(model, optimizer, batches(2))
    assert torch.equal(model[0].weight, before)
    assert torch.equal(extra, torch.ones(2))
    assert optimizer.precision(model[0].weight) is None
    assert optimizer.precision(extra) is None


def test_autocast_keeps_no_weights_of_an_earlier_draw():
    model = net().float()
    optimizer = OnlineNewton(model.parameters(), 0.1, num_data=1)
    x = torch.randn(5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = model(x)
        with optimizer.sampled(model):
            draw = model(x)
        assert not torch.equal(draw, mean)
        assert torch.equal(model(x), mean)


def test_calls_in_the_wrong_order_are_refused():
    model = net()
    optimizer = optimizer_of(model)
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="4 of 4 parameters have a gradient that was not computed at a draw"):
        optimizer.step()
    optimizer.zero_grad()
    with optimizer.sampled(model):
        loss = F.cross_entropy(model(x), y)
        with pytest.raises(RuntimeError, match="entered inside sampled"):
            optimizer.sampled(model).__enter__()
        with pytest.raises(RuntimeError, match="called inside sampled"):
            optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model.require_backward_grad_sync = False  # DistributedDataParallel inside its no_sync
    with pytest.raises(RuntimeError, match="leave no_sync out"):
        optimizer.sampled(model).__enter__()


def test_gradient_scalers_and_attachments_are_refused():
    model = bp.to_variational(net())
    optimizer = OnlineNewton(model.parameters(), 0.1, num_data=NUM_DATA)
    x, y = batches(1)[0]
    scaler = torch.amp.GradScaler("cpu")
    with optimizer.sampled(model):
        scaler.scale(F.cross_entropy(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="bfloat16 autocast"):
        scaler.step(optimizer)
    optimizer = OnlineNewton(model.parameters(), 0.1, num_data=NUM_DATA)
    with pytest.warns(UserWarning, match="weight_decay"):
        bp.attach(optimizer, model, num_data=NUM_DATA, temperature=0.0)
    with optimizer.sampled(model):
        F.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="does not come from a draw"), pytest.raises(RuntimeError, match="detach"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_data": 0}, ValueError, "num_data is 0"),
        ({"weight_decay": 0.0}, ValueError, "weight_decay is 0.0; expected a number above 0"),
        ({"lr": -1}, ValueError, "lr is -1"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas are"),
        ({"params": [nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]}, TypeError, "bfloat16.*autocast"),
    ],
)
def test_options_out_of_range_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        OnlineNewton(**{"params": net().parameters(), "lr": 0.1, "num_data": 10} | options)
