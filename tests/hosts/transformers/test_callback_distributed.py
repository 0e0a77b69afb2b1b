"""The stock Trainer in two processes, with DDP and with FSDP 2, against the ELBO written by hand in both of them."""

import copy
import os
import socket

import pytest
import torch
from accelerate import DistributedType, PartialState
from torch import distributed, multiprocessing, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

import bayesprune as bp
from bayesprune.hosts.transformers import BayesPruneCallback, PruneSchedule
from bayesprune.train.kl import bind_prior
from tests.hosts.transformers import tiny
from tests.hosts.transformers.test_callback import Recorder, largest_difference
from tests.oracles import HandMadeAdam
from tests.train.reference import clamp, others_of, stds_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed"),
]
NUM_PROCESSES = 2
STEPS = 6
LR = 1e-2
TEMPERATURE = 0.05
NUM_DATA = sum(label != -100 for row in tiny.language() for label in row["labels"][1:])
OPTIONS = {"ddp": {}, "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2}}}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def train_on_elbo(model: nn.Module, recorded: Recorder, accumulation: int) -> None:
    """Gradients of each process's own losses and noise, summed over processes, plus those of the KL."""
    bound = bind_prior(model, bp.priors.Gaussian())
    stds, others = stds_of(model), others_of(model)
    optimizer = torch.optim.AdamW(others.values(), lr=LR, weight_decay=0.0)
    adams = {name: HandMadeAdam(1e-2) for name in stds}
    names = {**others, **stds}
    model.train()
    for step in range(STEPS):
        total, count = torch.zeros(()), torch.zeros((), dtype=torch.long)
        for batch, random_state in recorded.batches[step * accumulation : (step + 1) * accumulation]:
            torch.set_rng_state(random_state)
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1).float()
            labels = batch["labels"][:, 1:].flatten()
            total = total + nn.functional.cross_entropy(logits, labels, reduction="sum")
            count += (labels != -100).sum()
        distributed.all_reduce(count)
        gradients = list(torch.autograd.grad(total / count, list(names.values())))
        for gradient in gradients:
            distributed.all_reduce(gradient)
        weight = TEMPERATURE * min(1.0, (step + 1) / (0.1 * STEPS)) / NUM_DATA
        kl = weight * sum(prior.kl(p.mean, p.log_std, p.mask) for p, prior in bound.items())
        of_kl = torch.autograd.grad(kl, list(names.values()), allow_unused=True)
        for name, gradient, kl_gradient in zip(names, gradients, of_kl, strict=True):
            names[name].grad = gradient if kl_gradient is None else gradient + kl_gradient
        optimizer.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        optimizer.step()
        with torch.no_grad():
            for name, part in stds.items():
                part.copy_(adams[name].moved(part, part.grad))
            for posterior, prior in bound.items():
                clamp(posterior.log_std_parts, prior.max_log_std)


def start_process(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_PROCESSES, "LOCAL_WORLD_SIZE": NUM_PROCESSES}
    os.environ.update({key: str(value) for key, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def trainer(kind: str, model: nn.Module, folder: str, callback: BayesPruneCallback, **options) -> Trainer:
    args = tiny.arguments(folder, per_device_train_batch_size=2, ddp_backend="gloo", **OPTIONS[kind] | options)
    assert args.world_size == NUM_PROCESSES
    if kind == "fsdp2":  # accelerate offers it to processes with GPUs alone, though torch shards on CPUs as well
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Trainer(model, args, train_dataset=tiny.language(), callbacks=[callback])


def compare(rank: int, port: int, folder: str, kind: str, accumulation: int) -> None:
    start_process(rank, port)
    model = bp.to_variational(tiny.llama().double(), relative_std=0.2).double()
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    recorder = Recorder(model)
    options = {"max_steps": STEPS, "gradient_accumulation_steps": accumulation}
    callback = BayesPruneCallback(temperature=TEMPERATURE)
    made = trainer(kind, model, folder, callback, logging_steps=1, **options)
    made.train()
    assert distributed.get_world_size() == NUM_PROCESSES
    seen = [{} for _ in range(NUM_PROCESSES)]
    first = recorder.batches[0]
    distributed.all_gather_object(seen, first[0]["input_ids"])
    assert not torch.equal(seen[0], seen[1]), "both processes see the same examples"
    assert any("kl_nats" in entry for entry in made.state.log_history)
    train_on_elbo(expected, recorder, accumulation)
    found = copy.deepcopy(start)
    found.load_state_dict({key: whole(value) for key, value in made.model.state_dict().items()})
    sharded = sum(isinstance(parameter, DTensor) for parameter in made.model.parameters())
    assert (sharded > 0) == (kind == "fsdp2")
    assert largest_difference(found, expected, start) < 1e-9
    distributed.destroy_process_group()


def resume(rank: int, port: int, folder: str) -> None:
    """A checkpoint that one process wrote continues in both; what they removed is the same."""
    start_process(rank, port)
    states = []
    for checkpoint, options in ((None, {"save_strategy": "steps", "save_steps": 4}), (f"{folder}/checkpoint-4", {})):
        callback = BayesPruneCallback(prune=PruneSchedule(0.5, begin=0.2, end=0.8))
        made = trainer("ddp", tiny.llama(), folder, callback, max_steps=STEPS, gradient_accumulation_steps=2, **options)
        made.train(resume_from_checkpoint=checkpoint)
        states.append(made.model.state_dict())
    assert any(key.endswith("_mask") and not value.all() for key, value in states[0].items())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), f"{key}: {(value.float() - states[1][key].float()).abs().max():.3g}"
        everywhere = [torch.empty_like(value) for _ in range(NUM_PROCESSES)]
        distributed.all_gather(everywhere, value.contiguous())
        assert torch.equal(*everywhere), f"{key} differs between processes"
    distributed.destroy_process_group()


def spawn(function, *args) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(function, (port, *args), nprocs=NUM_PROCESSES, start_method="spawn")


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", OPTIONS)
def test_two_processes_are_the_elbo(kind, accumulation, tmp_path):
    spawn(compare, str(tmp_path), kind, accumulation)


def test_two_processes_resume(tmp_path):
    spawn(resume, str(tmp_path))
