"""What the hook adds in place is the gradient of the KL by autograd, whichever way it takes."""

import pytest
import torch

import bayesprune as bp
from bayesprune.priors import ARD, Binding, BoundPrior, Gaussian, Prior
from bayesprune.train import fused
from bayesprune.train.fused import KLTerm, add_kl_gradients
from bayesprune.train.optimizers import StepCount
from tests.train.reference import NUM_DATA, net, train

WEIGHT = 0.3
PARTS = {
    "per_weight": [(4, 3, 2, 2)],
    "per_channel": [(4, 1, 1, 1)],
    "rank_one": [(4, 1, 1, 1), (1, 3, 1, 1)],
    "overlapping": [(4, 3, 1, 1), (1, 3, 1, 1)],
}


def target(std: str, prior: Prior, kept: str, dtype: torch.dtype = torch.float64) -> KLTerm:
    """Means and log stds that have a gradient already."""
    mean = torch.randn(4, 3, 2, 2, dtype=dtype)
    binding = Binding(mean + 0.1, 0.7, (0,), (1,))
    parts = [torch.randn(shape, dtype=torch.promote_types(dtype, torch.float32)) - 1 for shape in PARTS[std]]
    keep = {"all": None, "mask": torch.rand(mean.shape) > 0.4, "gates": torch.rand(mean.shape).double()}[kept]
    for tensor in (mean, *parts):
        tensor.grad = torch.randn_like(tensor)
    return KLTerm(mean, parts, prior.bind(binding), keep)


def expected(of: KLTerm, factor: float) -> list[torch.Tensor]:
    """The gradients by autograd, added to those that are there."""
    mean, *parts = (t.detach().double().requires_grad_() for t in (of.mean, *of.parts))
    kl = of.prior.kl(mean, sum(parts[1:], start=parts[0]), of.keep)
    added = torch.autograd.grad(factor * kl, (mean, *parts))
    return [t.grad.double() + more for t, more in zip((of.mean, *of.parts), added, strict=True)]


@pytest.mark.parametrize("way", ["whole", "pieces", "together"])
@pytest.mark.parametrize("kept", ["all", "mask", "gates"])
@pytest.mark.parametrize("prior", [Gaussian(0.3), Gaussian(0.3, centered=True), ARD("channel")], ids=repr)
@pytest.mark.parametrize("std", PARTS)
def test_gradients_are_autograds(monkeypatch, std, prior, kept, way):
    if way != "together":
        monkeypatch.setattr(fused, "_SMALL", 0)
    monkeypatch.setattr(fused, "_CACHED", 20 if way == "pieces" else 1 << 17)
    monkeypatch.setattr(fused, "_GROUPED", 50)  # one tensor of 48 weights a group
    for scale in (None, torch.tensor(2.0**12)):
        targets = [target(std, prior, kept) for _ in range(3)]
        factor = WEIGHT if scale is None else WEIGHT * float(scale)
        wanted = [expected(one, factor) for one in targets]
        add_kl_gradients(targets, WEIGHT, scale)
        for one, gradients in zip(targets, wanted, strict=True):
            for tensor, gradient in zip((one.mean, *one.parts), gradients, strict=True):
                torch.testing.assert_close(tensor.grad, gradient, rtol=1e-10, atol=1e-12 * factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", PARTS)
def test_in_lower_precision(std, dtype):
    for scale in (None, torch.tensor(2.0**16)):  # above float16's largest number
        one = target(std, Gaussian(0.3), "all", dtype)
        weight = 1e-3 if scale is None else 1e-7
        wanted = expected(one, weight * (1 if scale is None else float(scale)))
        add_kl_gradients([one], weight, scale)
        for tensor, gradient in zip((one.mean, *one.parts), wanted, strict=True):
            assert tensor.grad.dtype == tensor.dtype
            eps = torch.finfo(tensor.dtype).eps
            torch.testing.assert_close(tensor.grad.double(), gradient, rtol=16 * eps, atol=8 * eps)


def test_a_std_of_single_weights_takes_no_memory_of_its_size():
    """Beside the pieces nothing is allocated."""
    mean, log_std = torch.randn(512, 1024), torch.full((512, 1024), -3.0)
    mean.grad, log_std.grad = torch.zeros_like(mean), torch.zeros_like(mean)
    one = KLTerm(mean, [log_std], Gaussian(0.3).bind(Binding(mean, 1.0, (0,))))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        add_kl_gradients([one], WEIGHT)
    allocated = max(event.cpu_memory_usage for event in recorded.events())
    assert 0 < allocated <= 4 * fused._CACHED


def test_a_prior_that_is_only_its_kl():
    """What a user writes is trained as the built-in prior of the same density."""

    class OnlyKL(BoundPrior):
        def __init__(self, bound):
            self.bound = bound

        def kl(self, mean, log_std, keep=None):
            return self.bound.kl(mean, log_std, keep)

    class Own(Prior):
        def bind(self, binding):
            return OnlyKL(Gaussian(0.9).bind(binding))

    models = []
    for prior in (Own(), Gaussian(0.9)):
        model = net("rank_one")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        bp.attach(optimizer, model, num_data=NUM_DATA, prior=prior)
        train(model, optimizer)
        models.append(model)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_steps_that_a_scaler_skipped_are_not_counted():
    steps = StepCount()
    for found in (None, torch.tensor(0.0), torch.tensor(1.0), torch.tensor(2.0), None):
        steps.add(found)
    assert (steps.at_least, steps.at_most) == (2, 5)
    assert steps.value == steps.at_least == steps.at_most == 3
