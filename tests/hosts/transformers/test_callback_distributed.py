"""The stock Trainer in two processes, with DDP and with FSDP 2, against the ELBO written by hand in both of them."""

import copy
import os

import pytest
import torch
from accelerate import DistributedType, PartialState
from safetensors.torch import load_file
from torch import distributed, multiprocessing, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

import bayesprune as bp
from bayesprune.hosts.transformers import BayesPruneCallback, DistillationCallback, PruneSchedule, Tolerance
from bayesprune.train.kl import bind_prior
from tests.hosts.transformers import tiny
from tests.hosts.transformers.test_callback import Recorder, largest_difference
from tests.hosts.transformers.test_callback_resume import assert_equal
from tests.oracles import HandMadeAdam
from tests.processes import free_port
from tests.train.reference import clamp, others_of, stds_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed"),
]
NUM_PROCESSES = 2
STEPS = 20
LR = 1e-2
TEMPERATURE = 0.05
NUM_DATA = sum(label != -100 for row in tiny.language() for label in row["labels"][1:])
OPTIONS = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2}},
    "fsdp2 sharded files": {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}},
}
SCHEDULE = PruneSchedule("weights=0.5", begin=0.2, end=0.8)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def train_on_elbo(model: nn.Module, recorded: Recorder, accumulation: int, schedule: PruneSchedule | None) -> None:
    """Gradients of each process's own losses and noise, summed over processes, plus those of the KL."""
    if schedule is not None:
        bp.prune.make_masks(model)
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
        if schedule is not None:
            bp.prune_weights(model, f"weights={1 - schedule.sparsity_at((step + 1) / STEPS)}")


def start_process(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_PROCESSES, "LOCAL_WORLD_SIZE": NUM_PROCESSES}
    os.environ.update({key: str(value) for key, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def trainer(kind: str, model: nn.Module, folder: str, callback: BayesPruneCallback, **options) -> Trainer:
    args = tiny.arguments(folder, per_device_train_batch_size=2, ddp_backend="gloo", **OPTIONS[kind] | options)
    assert args.world_size == NUM_PROCESSES
    if kind.startswith(
        "fsdp2"
    ):  # accelerate offers it to processes with GPUs alone, though torch shards on CPUs as well
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Trainer(model, args, train_dataset=tiny.language(), eval_dataset=tiny.language(8), callbacks=[callback])


def compare(rank: int, port: int, folder: str, kind: str, accumulation: int, schedule: PruneSchedule | None) -> None:
    start_process(rank, port)
    structure = "per_weight" if schedule is None else "rank_one"
    model = bp.to_variational(tiny.llama().double(), std=structure, relative_std=0.2).double()
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    recorder = Recorder(model)
    options = {"max_steps": STEPS, "gradient_accumulation_steps": accumulation}
    callback = BayesPruneCallback(temperature=TEMPERATURE, prune=schedule)
    made = trainer(kind, model, folder, callback, logging_steps=1, **options)
    made.train()
    assert distributed.get_world_size() == NUM_PROCESSES
    seen = [{} for _ in range(NUM_PROCESSES)]
    first = recorder.batches[0]
    distributed.all_gather_object(seen, first[0]["input_ids"])
    assert not torch.equal(seen[0], seen[1]), "both processes see the same examples"
    assert any("kl_nats" in entry for entry in made.state.log_history)
    train_on_elbo(expected, recorder, accumulation, schedule)
    found = copy.deepcopy(start)
    if schedule is not None:
        assert made.state.log_history[-2]["sparsity"] == pytest.approx(schedule.sparsity, abs=1e-3)
        for name, buffer in expected.named_buffers():
            assert torch.equal(buffer, made.model.get_buffer(name)), name
    found.load_state_dict({key: whole(value) for key, value in made.model.state_dict().items()})
    sharded = sum(isinstance(parameter, DTensor) for parameter in made.model.parameters())
    assert (sharded > 0) == (kind == "fsdp2")
    assert largest_difference(found, expected, start) < 1e-9
    distributed.destroy_process_group()


def resume(rank: int, port: int, folder: str, kind: str) -> None:
    """A checkpoint that the processes wrote continues in both; what they removed is the same."""
    start_process(rank, port)
    states = []
    for checkpoint, options in ((None, {"save_strategy": "steps", "save_steps": 4}), (f"{folder}/checkpoint-4", {})):
        callback = BayesPruneCallback(prune=SCHEDULE)
        model = tiny.llama()
        recorder = Recorder(model)
        made = trainer(kind, model, folder, callback, max_steps=STEPS, gradient_accumulation_steps=2, **options)
        made.train(resume_from_checkpoint=checkpoint)
        assert len(recorder.batches) == 2 * (STEPS if checkpoint is None else STEPS - 4)
        states.append({key: whole(value) for key, value in made.model.state_dict().items()})
    assert any(key.endswith("_mask") and not value.all() for key, value in states[0].items())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), f"{key}: {(value.float() - states[1][key].float()).abs().max():.3g}"
        everywhere = [torch.empty_like(value) for _ in range(NUM_PROCESSES)]
        distributed.all_gather(everywhere, value.contiguous())
        assert torch.equal(*everywhere), f"{key} differs between processes"
    made.save_model(f"{folder}/final")
    if rank == 0 and "sharded" not in kind:
        alone = bp.to_variational(tiny.llama())
        alone.load_state_dict(load_file(f"{folder}/final/model.safetensors"))
        assert_equal(alone.state_dict(), states[0])
    distributed.destroy_process_group()


def evaluate(rank: int, port: int, folder: str, kind: str) -> None:
    """The model of an earlier evaluation comes back whole: the best one from its checkpoint, or one that was kept."""
    start_process(rank, port)
    schedule = PruneSchedule("weights=0.03", begin=0.6, end=0.7)
    options = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    best = trainer(
        kind,
        tiny.llama(),
        folder,
        BayesPruneCallback(prune=schedule),
        save_strategy="steps",
        save_steps=4,
        metric_for_best_model="loss",
        **options,
    )
    best.train()
    kept, resumed = (
        trainer(
            kind,
            tiny.llama(),
            f"{folder}/kept",
            BayesPruneCallback(prune=schedule, tolerance=Tolerance(0.0, reference=-1.0)),
            max_steps=8,
            eval_strategy="steps",
            eval_steps=4,
            save_strategy="steps",
            save_steps=6,
        )
        for _ in range(2)
    )
    kept.train()
    resumed.train(resume_from_checkpoint=f"{folder}/kept/checkpoint-6")
    for made in (best, kept, resumed):
        entries = {entry["step"]: entry for entry in made.state.log_history if "eval_loss" in entry}
        assert entries[8]["eval_sparsity"] == pytest.approx(0.97, abs=1e-3)
        metrics = made.evaluate()
        assert metrics["eval_sparsity"] == 0.0
        assert metrics["eval_loss"] == entries[4]["eval_loss"]
    distributed.destroy_process_group()


def distil(rank: int, port: int, folder: str, kind: str) -> None:
    """What one process learns from whole batches, two learn from halves, whose label tokens differ in number."""
    start_process(rank, port)
    model, teacher = tiny.llama().double(), tiny.llama().double()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(30)
    callback = DistillationCallback(bp.distillation(teacher, temperature=2.0, weight=0.8))
    made = trainer(kind, model, folder, callback, max_steps=6, logging_steps=1, gradient_accumulation_steps=2)
    recorder = Recorder(made.model)
    made.train()
    state = {key: whole(value) for key, value in made.model.state_dict().items()}
    if rank == 0:
        torch.save((state, [entry["loss"] for entry in made.state.log_history if "nll" in entry]), f"{folder}/end.pt")
    torch.save([batch for batch, _ in recorder.batches], f"{folder}/batches-{rank}.pt")
    distributed.destroy_process_group()


def spawn(function, *args) -> None:
    multiprocessing.start_processes(function, (free_port(), *args), nprocs=NUM_PROCESSES, start_method="spawn")


@pytest.mark.parametrize(
    ("kind", "accumulation", "schedule"),
    [("ddp", 1, None), ("ddp", 4, None), ("fsdp2", 1, None), ("fsdp2", 4, None), ("fsdp2", 2, SCHEDULE)],
)
def test_two_processes_are_the_elbo(kind, accumulation, schedule, tmp_path):
    spawn(compare, str(tmp_path), kind, accumulation, schedule)


@pytest.mark.parametrize("kind", OPTIONS)
def test_two_processes_resume(kind, tmp_path):
    spawn(resume, str(tmp_path), kind)


def test_an_earlier_model_comes_back(tmp_path):
    spawn(evaluate, str(tmp_path), "fsdp2")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_distil_as_one(kind, tmp_path):
    spawn(distil, str(tmp_path), kind)
    state, losses = torch.load(tmp_path / "end.pt", weights_only=True)
    halves = [torch.load(tmp_path / f"batches-{rank}.pt", weights_only=True) for rank in range(NUM_PROCESSES)]
    model, teacher = tiny.llama().double(), tiny.llama().double()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(30)
    distill = bp.distillation(teacher, temperature=2.0, weight=0.8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for step in range(6):
        terms, task = [], []
        for batch in (half[2 * step + part] for half in halves for part in range(2)):
            outputs = model.train()(input_ids=batch["input_ids"])
            terms.append(distill.divergences(outputs, batch))
            labels = batch["labels"][:, 1:].flatten()
            each = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels, reduction="none")
            task.append(each[labels != -100])
        assert len({len(term) for term in terms}) > 1
        loss = 0.8 * torch.cat(terms).mean() + 0.2 * torch.cat(task).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = LR * (1 - step / 6)
        optimizer.step()
        assert losses[step] == pytest.approx(float(loss.detach()), rel=1e-4)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5, msg=key)
