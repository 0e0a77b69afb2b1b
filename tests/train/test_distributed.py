"""Two processes, each with half of every batch and noise of its own, take the step of one."""

import copy
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

import bayesprune as bp
from bayesprune.foundation import noise
from bayesprune.foundation.sharding import full_tensor
from tests.oracles import HandMadeAdam
from tests.train.reference import NUM_DATA, assert_same_parameters, batches, others_of, stds_of, train

NUM_PROCESSES = 2
LR = 0.05


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return bp.to_variational(model, std="rank_one", relative_std=0.2).double()


def local_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], rank: int) -> torch.Tensor:
    x, y = (part.chunk(NUM_PROCESSES)[rank] for part in batch)
    return nn.functional.cross_entropy(model(x), y)


def step_on_elbo(model: nn.Module, batch: tuple, rank: int, adams: dict[str, HandMadeAdam]) -> None:
    """Gradients of the local losses averaged over processes, plus those of the KL."""
    stds, others = stds_of(model), others_of(model)
    names = {**others, **stds}
    gradients = torch.autograd.grad(local_loss(model, batch, rank), list(names.values()))
    for gradient in gradients:
        distributed.all_reduce(gradient)
    kl = 0.1 / NUM_DATA * bp.kl_divergence(model, bp.priors.Gaussian(0.3))
    of_kl = torch.autograd.grad(kl, list(names.values()))
    with torch.no_grad():
        for (name, parameter), gradient, kl_gradient in zip(names.items(), gradients, of_kl, strict=True):
            total = gradient / NUM_PROCESSES + kl_gradient
            parameter.copy_(adams[name].moved(parameter, total) if name in stds else parameter - LR * total)


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=NUM_PROCESSES)
    torch.manual_seed(7)
    draw = noise.normal((1000,), device=torch.device("cpu"), dtype=torch.float64)

    model = net()
    bp.prune_weights(model, "weights=0.75")
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    adams = {name: HandMadeAdam(1e-2) for name in stds_of(model)}
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=LR)
    bp.attach(optimizer, wrapped, num_data=NUM_DATA, prior=bp.priors.Gaussian(0.3))
    for number, batch in enumerate(batches()):
        torch.manual_seed(number)  # alike on every rank, as trainers do
        optimizer.zero_grad()
        local_loss(wrapped, batch, rank).backward()
        optimizer.step()
        torch.manual_seed(number)
        step_on_elbo(expected, batch, rank, adams)
    assert_same_parameters(model, expected, start, rel=1e-8)
    torch.save({"draw": draw, "model": model.state_dict()}, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_wrapped_model_takes_the_steps_of_the_plain_one(process_group, accumulation, view):
    """The wrapper broadcasts masks as buffers; with views the hook adds to gradients inside its buckets."""
    runs = []
    for is_wrapped in (False, True):
        model = net()
        bp.prune_weights(model, "weights=0.75")
        trained = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view) if is_wrapped else model
        optimizer = torch.optim.SGD(trained.parameters(), lr=LR, momentum=0.9)
        bp.attach(optimizer, trained, num_data=NUM_DATA)
        train(trained, optimizer, accumulation=accumulation)
        runs.append(model.state_dict())
    for key, value in runs[0].items():
        assert torch.equal(value, runs[1][key]), key


@pytest.mark.parametrize("structure", ["per_weight", "rank_one", "per_channel"])
def test_a_sharded_model_takes_the_steps_of_the_plain_one(process_group, structure):
    """With FSDP 2: the step, what is removed, and an attachment that continues from tensors which are whole."""
    runs = []
    for is_sharded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        bp.to_variational(model, std=structure, relative_std=0.2).double()
        if is_sharded:
            fully_shard(model)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        attachment = bp.attach(optimizer, model, num_data=NUM_DATA, prior=bp.priors.Gaussian(centered=True))
        train(model, optimizer)
        report = bp.prune_weights(model, "weights=0.6")
        assert report.sparsity == pytest.approx(0.4, abs=0.01)
        saved = tree_map(
            lambda value: full_tensor(value) if isinstance(value, torch.Tensor) else value, attachment.state_dict()
        )
        attachment.detach()
        attachment = bp.attach(optimizer, model, num_data=NUM_DATA, prior=bp.priors.Gaussian(centered=True))
        attachment.load_state_dict(saved)
        train(model, optimizer)
        runs.append({key: full_tensor(value) for key, value in model.state_dict().items()})
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, rtol=0, atol=1e-14, msg=key)
        assert not key.endswith("_mask") or not runs[1][key.removesuffix("_mask")][~value].any()


@pytest.mark.slow
def test_two_processes(tmp_path):
    multiprocessing.start_processes(run, (str(tmp_path),), nprocs=NUM_PROCESSES, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(NUM_PROCESSES))
    assert not torch.equal(first["draw"], second["draw"])
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]), f"{key} differs between processes"
