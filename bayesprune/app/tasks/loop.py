"""Classes, or next tokens, of batches from data loaders, learned by a plain loop in one process or several."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from bayesprune.app.data import Loaders
from bayesprune.app.tasks.task import Checkpoint, Progress, Split, Task, Training, check_finite, own_forward
from bayesprune.bits import StraightThrough
from bayesprune.foundation import defaults
from bayesprune.foundation.batches import IGNORED_LABEL, check_labels, device_of, logits_of, on_device, split
from bayesprune.foundation.model import load_values
from bayesprune.foundation.sharding import full_tensor, shard_like, shard_values_like, whole_values
from bayesprune.foundation.text import quoted
from bayesprune.prune import PruneSchedule
from bayesprune.reports import ACCURACY, PERPLEXITY, Metric, accuracy, perplexity
from bayesprune.train import attach


class LoaderTask(Task):
    """Batches from loaders: AdamW, one cycle of the learning rate, precision and processes as accelerate says.

    With several processes each has its part of every epoch, in batches of the loader's size, and a model of its own
    that DDP keeps equal to the others; under FSDP 2 a copy is sharded while it is trained, and each process holds the
    whole weights beside it. The validation score is the main process's in all of them.
    """

    def __init__(
        self, data: Loaders, accelerator: Accelerator, *, metric: Metric = ACCURACY, example_inputs: Any = None
    ) -> None:
        """Takes the loaders as they are.

        Args:
            data: Inputs with class numbers, or for perplexity with the tokens themselves as labels.
            accelerator: Says in which precision and how many processes.
            metric: Accuracy, or perplexity of a causal language model.
            example_inputs: One example as the forward takes it; None is an image of the first validation batch.

        Raises:
            ValueError: several processes are to share batches that the loader's own sampler makes.
        """
        self.data, self.accelerator, self.description, self.metric = data, accelerator, data.description, metric
        self._loader = _part_of(data.train, accelerator) if accelerator.num_processes > 1 else data.train
        self.calibration: Iterable[Any] = data.train
        self.example_inputs = next(iter(data.validation))[0][:1] if example_inputs is None else example_inputs
        self.generators = [data.train.generator] if isinstance(data.train.generator, torch.Generator) else []
        self.is_main: bool = accelerator.is_main_process
        self.is_sharded: bool = accelerator.distributed_type == DistributedType.FSDP

    def train(
        self, model: nn.Module, progress: Progress, training: Training, *, checkpoint: Checkpoint | None = None
    ) -> None:
        """Minimises the cross-entropy; removes weights by the default schedule.

        Raises:
            UnsupportedModelError: weights are to be held to grids, and are cut over processes.
        """
        trained = copy.deepcopy(model) if self.is_sharded else model
        with own_forward(trained):
            self._fit(trained, progress, training, checkpoint)
        if self.is_sharded:
            load_values(model, {name: full_tensor(value) for name, value in trained.state_dict().items()})
        if self.accelerator.num_processes > 1:  # each has batch-norm statistics of its own images
            with torch.no_grad():
                broadcast(list(model.state_dict().values()))
        model.eval()

    def _fit(self, trained: nn.Module, progress: Progress, training: Training, checkpoint: Checkpoint | None) -> None:
        device, loader = device_of(trained), self._loader
        optimizer = torch.optim.AdamW(trained.parameters(), lr=training.lr, weight_decay=0.0)
        num_steps = training.num_epochs * len(loader)
        wrapped, stepper = self.accelerator.prepare(trained, optimizer)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.lr, total_steps=num_steps)
        parts: dict[str, Any] = {"model": trained, "optimizer": optimizer, "schedule": schedule}
        attachment = rounding = None
        if training.learn_stds:
            attachment = parts["attachment"] = attach(
                optimizer,
                trained,
                num_data=self._num_terms(trained),
                num_steps=num_steps,
                temperature=training.temperature,
                warmup=defaults.WARMUP,
                prune=None if training.target is None else PruneSchedule(training.target),
            )
        if training.rounded is not None:
            rounding = parts["rounding"] = StraightThrough(optimizer, trained, training.rounded)
        if self.accelerator.scaler is not None:
            parts["scaler"] = self.accelerator.scaler
        batches = _Batches(loader, training.num_epochs, parts, checkpoint)
        trained.train()
        watched = nullcontext() if training.distill is None else training.distill.watch(trained)
        with watched, progress.training(training.num_epochs, len(loader)) as advance:
            for _ in range(batches.num_done):
                advance(float("nan"))
            for step, batch in batches:
                stepper.zero_grad()
                with self.accelerator.autocast():
                    inputs = split(trained, on_device(batch, device))
                    outputs = inputs.run(wrapped)
                    loss = self._loss(outputs, inputs.labels)
                    loss = loss if training.distill is None else training.distill(outputs, batch, loss)
                number = check_finite(float(loss.detach()), training.lr)
                self.accelerator.backward(loss)
                stepper.step()
                schedule.step()
                advance(number)
                if checkpoint is not None and self._is_agreed(checkpoint.is_due(step)):
                    checkpoint.keep(step, batches.state())
        if rounding is not None:
            rounding.finish()
        if attachment is not None:
            attachment.detach()
        self.accelerator.free_memory()

    def score(self, model: nn.Module, split: Split) -> float:
        """Top-1 accuracy, or perplexity."""
        measure = perplexity if self.metric == PERPLEXITY else accuracy
        score = measure(model, self.examples(split))
        return score if split == "test" else self._of_main(score)

    def examples(self, split: Split) -> Iterable[Any]:
        """The loader itself."""
        return self.data.validation if split == "validation" else self.data.test

    def _num_terms(self, model: nn.Module) -> int:
        """Terms of the loss in one pass over the training data: examples, or label tokens of a language model."""
        if self.metric != PERPLEXITY:
            return self.data.num_data
        labels = (self._terms(split(model, batch).labels) for batch in self.data.train)
        return int(self._of_main(sum(int(tokens.ne(IGNORED_LABEL).sum()) for tokens in labels)))

    def _loss(self, outputs: Any, labels: Any) -> Tensor:
        """Mean cross-entropy of the labels, of a language model those of the token after each position."""
        logits, labels = logits_of(outputs).float(), self._terms(labels)
        if self.metric == PERPLEXITY:
            logits, labels = logits[:, :-1].flatten(0, 1), labels.flatten()
        if not bool((labels != IGNORED_LABEL).any()):
            return logits.sum() * 0.0  # a mean of no terms
        check_labels(labels, logits.shape[1])
        return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)

    def _terms(self, labels: Any) -> Tensor:
        if not isinstance(labels, Tensor):
            kind = type(labels).__name__
            raise ValueError(f"the labels of a training batch are {kind}; expected a tensor of class numbers.")
        if labels.is_floating_point():
            raise ValueError(f"the labels of a training batch are {labels.dtype}; expected whole numbers, of classes.")
        return (labels[:, 1:] if self.metric == PERPLEXITY else labels).long()

    def save_preparation(self, directory: Path) -> None:
        """Nothing: timm's `config.json` says how images are prepared."""

    def loading_instructions(self, directory: Path) -> str:
        """By `bayesprune.load`."""
        return f"import bayesprune; model = bayesprune.load({quoted(directory)})"

    def close(self) -> None:
        """Waits for the main process, and ends the group of processes."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _is_agreed(self, decision: bool) -> bool:
        """The main process's decision where all have to take part: sharded tensors are gathered."""
        return bool(self._of_main(float(decision))) if self.is_sharded else decision

    def _of_main(self, number: float) -> float:
        """The main process's number."""
        if self.accelerator.num_processes == 1:
            return number
        found = torch.tensor([number], dtype=torch.float64, device=self.accelerator.device)
        broadcast(found)
        return float(found)


def check_launch(accelerator: Accelerator, device: str | None) -> None:
    """Refuses what the loop does not do.

    Raises:
        ValueError: the model is to be spread in another way than by FSDP 2, gradients are to be accumulated, or a
            device was named for all processes.
    """
    kind = accelerator.distributed_type
    is_fsdp2 = getattr(accelerator, "is_fsdp2", False)  # absent before accelerate knew it
    if not is_fsdp2 and kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        name = "FSDP 1" if kind == DistributedType.FSDP else kind.value
        raise ValueError(f"compress was launched with {name}; expected one process, DDP or FSDP 2 (fsdp_version: 2).")
    if (num_steps := accelerator.gradient_accumulation_steps) > 1:
        raise ValueError(
            f"compress was launched with gradient_accumulation_steps={num_steps}, and takes a step after each batch; "
            "leave it out, and choose the batch size."
        )
    if accelerator.num_processes > 1 and device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device is {device!r} for {accelerator.num_processes} processes; leave it out.")


def _part_of(loader: DataLoader[Any], accelerator: Accelerator) -> DataLoader[Any]:
    """A loader like this one of one process's part of each epoch, in batches of the same size."""
    dataset: Any = loader.dataset
    own = [loader.sampler, loader.batch_sampler]
    if [type(sampler) for sampler in own] not in ([RandomSampler, BatchSampler], [SequentialSampler, BatchSampler]):
        names = " and ".join(type(sampler).__name__ for sampler in own)
        raise ValueError(
            f"the training batches are made by {names}, and {accelerator.num_processes} processes are to share them; "
            "expected a DataLoader with a batch_size, and with shuffle in place of a sampler. Or launch one process."
        )
    num_processes = accelerator.num_processes
    return DataLoader(
        dataset,
        min(loader.batch_size or 1, max(1, len(dataset) // num_processes)),
        sampler=DistributedSampler(dataset, num_processes, accelerator.process_index, drop_last=True),
        drop_last=True,
        num_workers=loader.num_workers,
        generator=loader.generator,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        pin_memory=loader.pin_memory,
    )


def _generator_of(loader: DataLoader[Any]) -> torch.Generator:
    """What draws the order of the examples; torch's global one where the loader has none."""
    return loader.generator if isinstance(loader.generator, torch.Generator) else torch.default_generator


class _Batches:
    """All batches of a training with their numbers from 1, but those that were done before a kill."""

    def __init__(
        self, loader: DataLoader[Any], num_epochs: int, parts: Mapping[str, Any], checkpoint: Checkpoint | None
    ) -> None:
        """Puts the parts, all that a training changes, into the state of the checkpoint, if there is one."""
        self._loader, self._num_epochs, self._parts, self._checkpoint = loader, num_epochs, parts, checkpoint
        self._order: Tensor | None = None
        self._saved = None if checkpoint is None else checkpoint.saved()
        self.num_done = 0 if self._saved is None else int(self._saved["step"])
        for name, part in self._parts.items():
            if self._saved is not None:
                _restore(part, self._saved[name])

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        generator, step = _generator_of(self._loader), self.num_done
        # Of an epoch that is done all batches are skipped: samplers draw once more when they have given the last.
        first_epoch = max(0, self.num_done - 1) // len(self._loader)
        num_skipped = self.num_done - first_epoch * len(self._loader)
        for epoch in range(first_epoch, self._num_epochs):
            if isinstance(self._loader.sampler, DistributedSampler):
                self._loader.sampler.set_epoch(epoch)
            if num_skipped and self._saved is not None:
                generator.set_state(self._saved["order"])
            self._order = generator.get_state()
            batches = iter(self._loader)
            for _ in islice(batches, num_skipped):
                pass
            if num_skipped and self._checkpoint is not None and self._saved is not None:
                self._checkpoint.restore_random_state()
            num_skipped = 0
            for batch in batches:
                step += 1
                yield step, batch

    def state(self) -> dict[str, Any]:
        """All that a checkpoint needs, whole; under FSDP 2 every process calls it."""
        return {"order": self._order, **whole_values({name: part.state_dict() for name, part in self._parts.items()})}


def _restore(part: Any, state: dict[str, Any]) -> None:
    """`part.load_state_dict` of whole tensors, which are cut where the part is sharded."""
    if isinstance(part, nn.Module):
        current = part.state_dict()
        state = {name: shard_like(value, current[name]) if name in current else value for name, value in state.items()}
        load_values(part, state)
        return
    part.load_state_dict(state)
    if isinstance(part, torch.optim.Optimizer):
        for parameter, values in part.state.items():
            values.update(shard_values_like(parameter, values))
