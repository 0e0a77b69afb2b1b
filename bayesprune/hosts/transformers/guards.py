"""What would train a wrong posterior without a word, said at the start with the line that mends it.

Of FSDP 2: torch refuses to load a sharded optimizer's state that has nothing for a parameter which trains, and the log
stds have nothing there: the attachment moves them. An optimizer takes what trains when it is made, so until training
begins the log stds do not.
"""

import sys
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from bayesprune.errors import UnsupportedModelError
from bayesprune.layers import VariationalLayer, named_posteriors, variational_layers


def check_parallelism(distributed_type: str, *, fsdp_version: int, num_threads: int, sends_masks: bool) -> None:
    """Refuses ways of spreading a model that cut means, stds and masks apart.

    Args:
        distributed_type: accelerate's name of it, such as "NO", "MULTI_GPU", "FSDP" or "DEEPSPEED".
        fsdp_version: 1 or 2 with FSDP, 0 without.
        num_threads: GPUs that one process drives (`nn.DataParallel`).
        sends_masks: Whether one process is to send a model that has masks to the others.

    Raises:
        UnsupportedModelError: DeepSpeed, FSDP 1, `nn.DataParallel`, or masks that would have to be sent.
    """
    if distributed_type == "DEEPSPEED":
        raise UnsupportedModelError(
            "BayesPruneCallback got DeepSpeed, which steps inside backward and flattens parameters; expected one "
            "process, DDP or FSDP 2. Remove `deepspeed` and set TrainingArguments(fsdp=True, "
            'fsdp_config={"version": 2}).'
        )
    if fsdp_version == 1:
        raise UnsupportedModelError(
            "BayesPruneCallback got FSDP 1, which flattens means and stds and cuts them at different places; expected "
            'FSDP 2. Set TrainingArguments(fsdp_config={"version": 2}).'
        )
    if sends_masks:
        raise UnsupportedModelError(
            "BayesPruneCallback got prune=... with cpu_ram_efficient_loading, where accelerate sends sharded "
            'parameters alone and masks are not; set TrainingArguments(fsdp_config={"cpu_ram_efficient_loading": '
            "False}), or train with prune=None and call bayesprune.prune_weights on the trained model."
        )
    if num_threads > 1:
        raise UnsupportedModelError(
            f"BayesPruneCallback got {num_threads} GPUs in one process (nn.DataParallel), whose copies of a layer have "
            "no posteriors; start the program with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU."
        )


def shapes(model: nn.Module) -> dict[str, tuple[torch.Size, ...]]:
    """Shapes of mean and log stds of every posterior."""
    return {p.name: (p.mean.shape, *(part.shape for part in p.log_std_parts)) for p in named_posteriors(model)}


def check_shapes(model: nn.Module, expected: Mapping[str, tuple[torch.Size, ...]]) -> None:
    """Refuses a model that was cut while it trains.

    Raises:
        RuntimeError: a posterior has another shape, or is gone.
    """
    found = shapes(model)
    changed = [name for name, shape in expected.items() if found.get(name) != shape]
    if changed:
        name = changed[0]
        now = tuple(found[name][0]) if name in found else "gone"
        raise RuntimeError(
            f"{name} was {tuple(expected[name][0])} when training began and is {now} ({len(changed)} such): optimizer, "
            "checkpoints and wrappers still hold the old one. Remove channels after trainer.train(), not inside it."
        )


def probe_of(model: nn.Module, args: TrainingArguments, loader: Any) -> "LossScaleProbe | None":
    """The probe of a training that begins; None where one optimizer step sees one batch in one process."""
    num_batches = min(args.gradient_accumulation_steps, len(loader) if hasattr(loader, "__len__") else sys.maxsize)
    if num_batches * args.world_size <= 1:
        return None
    compiler = AcceleratorState().dynamo_plugin
    return LossScaleProbe(
        model,
        num_batches=num_batches,
        num_processes=args.world_size,
        is_compiled=compiler is not None and compiler.backend != DynamoBackend.NO,
    )


class LossScaleProbe:
    """Finds out, on the first batch, whether the loss is a mean over all that one optimizer step sees.

    The Trainer leaves the division to a model whose forward takes `**kwargs` and hands it `num_items_in_batch`. Many
    heads ignore that number (transformers issue 47688), so that their gradients are too large by the number of
    accumulation steps and processes, and the KL weighs too little by as much. Whether backward reaches the number says
    whether the head used it; the gradient that arrives at the loss says whether the Trainer divided instead.
    A compiled model shows neither, so its first forward runs eagerly.
    """

    def __init__(self, model: nn.Module, *, num_batches: int, num_processes: int, is_compiled: bool = False) -> None:
        """Looks at the next training batch of `model`.

        Args:
            model: The model that computes the loss.
            num_batches: Batches that one optimizer step sees in one process.
            num_processes: Processes whose gradients are averaged.
            is_compiled: Whether the forward is compiled, so that it has to be made eager once.
        """
        self._model, self._num_batches, self._num_processes = model, num_batches, num_processes
        self._number: Tensor | None = None
        self._arrived: list[Tensor] = []
        self._is_compiled, self._eager = is_compiled, ExitStack()
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
            model.register_forward_hook(self._compile_again, always_call=True),  # also where the forward has failed
        ]

    def begin(self) -> None:
        """Makes the forward that comes next an eager one."""
        if self._is_compiled and self._handles:
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))

    def check(self, optimizer: Optimizer | None) -> None:
        """Judges the batch whose backward has run, if it has, and ends the probe.

        Args:
            optimizer: accelerate's, which knows the scale of fp16 losses.

        Raises:
            ValueError: the loss is larger than a mean.
        """
        if not self._handles or not (self._arrived or self._is_compiled):
            return
        self.end()  # seen or not: the compiled forwards that follow show nothing, and are not to hold hooks
        if not self._arrived:
            return
        assert self._number is not None, "a gradient arrived, so the batch was seen"
        if self._number.grad is not None:
            return
        scaler = getattr(optimizer, "scaler", None)
        scale = float(self._arrived[0]) / (scaler.get_scale() if scaler is not None else 1.0)
        excess = scale * self._num_batches
        if excess > 1.01:
            raise ValueError(
                f"{type(self._model).__name__} ignores num_items_in_batch (transformers issue 47688), so its gradients "
                f"are {excess:g} times too large with {self._num_batches} accumulated batches and "
                f"{self._num_processes} processes, and the KL weighs too little by as much. Put "
                "`model.accepts_loss_kwargs = False` before Trainer(...)."
            )

    def end(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._eager.close()

    def _compile_again(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._eager.close()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        number = kwargs.get("num_items_in_batch")
        if number is None or kwargs.get("labels") is None or not module.training or torch.compiler.is_compiling():
            return None  # without labels the Trainer computes the loss, and divides it
        if isinstance(number, Tensor) and number.requires_grad:
            self._number = number  # another probe's
            return None
        self._number = torch.as_tensor(number, dtype=torch.float32).detach().clone().requires_grad_()
        return args, {**kwargs, "num_items_in_batch": self._number}

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._number is None or self._arrived:
            return
        loss = output["loss"] if isinstance(output, Mapping) else output[0]
        if loss.requires_grad:
            loss.register_hook(lambda gradient: self._arrived.append(gradient.detach()))


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT made this model, or put adapters into it."""
    return bool(getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False))


def warn_of_pruning(model: nn.Module) -> None:
    """Says that a sparsity would be one of the adapters alone."""
    if has_adapters(model):
        warnings.warn(
            "prune=... removes weights of the adapters alone; the frozen weights below them stay, and merging fills "
            "the zeros. To compress the model, merge first: Trainer(model.merge_and_unload(), ...), or set prune=None.",
            stacklevel=3,
        )


Frozen = list[tuple[VariationalLayer, str]]


def check_dtypes(model: nn.Module, mixed_precision: str) -> None:
    """Refuses a model in half precision beside float32 stds, which FSDP 2 does not shard together.

    Args:
        model: The variational model.
        mixed_precision: accelerate's, which turns what trains into float32 unless it is "no".

    Raises:
        UnsupportedModelError: a layer's weight is of half precision and stays so.
    """
    for name, layer in variational_layers(model) if mixed_precision == "no" else ():
        for parameter in layer.parameters(recurse=False):
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                raise UnsupportedModelError(
                    f"BayesPruneCallback got FSDP 2 with {name} in {parameter.dtype}, which is not sharded together "
                    "with its float32 stds. Load the model with dtype=torch.float32 and set "
                    "TrainingArguments(bf16=True), so that it computes in half precision."
                )


def freeze_stds(model: nn.Module) -> Frozen:
    """The log stds that trained, by layer and name: FSDP replaces the parameter objects."""
    frozen = []
    for _, layer in variational_layers(model):
        parts = {id(part) for name in layer.active_names() for part in layer.log_std_parts(name)}
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) in parts and parameter.requires_grad:
                parameter.requires_grad_(False)
                frozen.append((layer, name))
    return frozen


def thaw(frozen: Frozen) -> None:
    """Undoes `freeze_stds`."""
    for layer, name in frozen:
        layer.get_parameter(name).requires_grad_()
