"""The recipe of timm's train.py in short, with the three lines that make it learn posteriors and remove weights.

Made of what train.py is made of, in its order: task, optimizer, resume, average (EMA), DDP, loaders, scheduler, saver.
Alone or under torchrun: `torchrun --nproc_per_node 2 integrations/timm/train_like.py --data-dir images`.
"""

import argparse
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, NativeScaler, dispatch_clip_grad, init_distributed_device, random_seed

import bayesprune as bp
from bayesprune.hosts.timm import BayesPruneTask

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data-dir", type=Path, required=True, help="a folder with train/CLASS/* and validation/CLASS/*")
parser.add_argument("--output", type=Path, default=Path("out/timm-train"))
parser.add_argument("--model", default="resnet18")
parser.add_argument("--initial-checkpoint", default="")
parser.add_argument("--resume", default="")
parser.add_argument("--num-classes", type=int, default=2)
parser.add_argument("--img-size", type=int, default=32)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--stop-epoch", type=int)
parser.add_argument("--opt", default="adamw")
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--amp-dtype", choices=("float16", "bfloat16"))
parser.add_argument("--grad-accum-steps", type=int, default=1)
parser.add_argument("--clip-grad", type=float)
parser.add_argument("--clip-mode", default="norm")
parser.add_argument("--model-ema-decay", type=float)
parser.add_argument("--channels-last", action="store_true")
parser.add_argument("--device", default="cpu")
parser.add_argument("--prune", help="weights=0.2, say: the fraction of the weights that is kept")


def main(*argv: str) -> dict[str, float]:
    """Trains, saves what `bayesprune.load` reads, and says how sparse it is and how well it does."""
    args = parser.parse_args(argv or None)
    device = init_distributed_device(args)
    model = create_model(args.model, num_classes=args.num_classes, checkpoint_path=args.initial_checkpoint).to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    amp_dtype = getattr(torch, args.amp_dtype or "float32")
    amp_autocast = partial(torch.autocast, device.type, amp_dtype) if args.amp_dtype else nullcontext
    loss_scaler = NativeScaler(device.type) if args.amp_dtype == "float16" else None

    task = ClassificationTask(model, LabelSmoothingCrossEntropy(0.1), device=device, verbose=False)
    task = BayesPruneTask(task, prune=args.prune)  # +
    optimizer = create_optimizer_v2(task.get_trainable_module(), args.opt, lr=args.lr, weight_decay=0.0)
    resume_epoch = resume_task_checkpoint(task, args.resume, optimizer, loss_scaler) if args.resume else None
    if args.model_ema_decay:
        task.setup_ema(decay=args.model_ema_decay)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.distributed:
        task.prepare_distributed(device_ids=None if device.type == "cpu" else [device])

    loaders = {}
    for split in ("train", "validation"):
        loaders[split] = create_loader(
            create_dataset("", root=str(args.data_dir), split=split),
            input_size=(3, args.img_size, args.img_size),
            batch_size=args.batch_size,
            is_training=split == "train",
            no_aug=True,
            num_workers=0,
            distributed=args.distributed,
            device=device,
            use_prefetcher=False,
            pin_memory=False,
            persistent_workers=False,
        )
    loader_train = loaders["train"]
    updates_per_epoch = -(-len(loader_train) // args.grad_accum_steps)
    scheduler, num_epochs = create_scheduler_v2(optimizer, num_epochs=args.epochs, min_lr=1e-6)
    if resume_epoch:
        scheduler.step(resume_epoch)
    task.attach(optimizer, loader_train, num_steps=num_epochs * updates_per_epoch)  # +

    saver = None
    if args.rank == 0:
        args.output.mkdir(parents=True, exist_ok=True)
        saver = CheckpointSaver(
            model, optimizer, amp_scaler=loss_scaler, checkpoint_dir=str(args.output), max_history=2, task=task
        )
    metrics: dict[str, float] = {}
    for epoch in range(resume_epoch or 0, args.stop_epoch or num_epochs):
        random_seed(epoch, args.rank)  # train.py seeds once; so a resumed run draws what a whole one draws
        if args.distributed:
            loader_train.sampler.set_epoch(epoch)
        task.train()
        for index, (images, labels) in enumerate(loader_train):
            images, labels = images.to(device), labels.to(device)
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            first = index - index % args.grad_accum_steps
            accumulated = min(args.grad_accum_steps, len(loader_train) - first)
            need_update = index == first + accumulated - 1
            with nullcontext() if need_update else task.no_sync():
                with amp_autocast():
                    loss = task(images, labels)["loss"] / accumulated
                clipped = task.get_clip_parameters(exclude_head="agc" in args.clip_mode)
                if loss_scaler is not None:
                    options = {"clip_grad": args.clip_grad, "clip_mode": args.clip_mode, "parameters": clipped}
                    loss_scaler(loss, optimizer, need_update=need_update, **options)
                else:
                    loss.backward()
                    if need_update:
                        if args.clip_grad is not None:
                            dispatch_clip_grad(clipped, args.clip_grad, args.clip_mode)
                        optimizer.step()
            if need_update:
                optimizer.zero_grad()
                task.update_ema(step=epoch * updates_per_epoch + index // args.grad_accum_steps + 1)
        metrics = evaluate(task, loaders["validation"], device, ema=bool(args.model_ema_decay))
        scheduler.step(epoch + 1, metrics["top1"])
        if saver is not None:
            saver.save_checkpoint(epoch, metrics["top1"])

    if saver is not None:
        bp.save(bp.to_deterministic(model), args.output / "model")  # +
        loaded = bp.load(args.output / "model").eval()
        weights = [parameter for parameter in loaded.parameters() if parameter.dim() > 1]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        metrics["sparsity"] = zeros / sum(weight.numel() for weight in weights)
    return metrics


@torch.no_grad()
def evaluate(task: BayesPruneTask, loader: torch.utils.data.DataLoader, device: torch.device, *, ema: bool) -> dict:
    """Loss and accuracy of the model, or of its average."""
    model = task.get_eval_model(ema=ema).eval()
    evaluator = task.create_evaluator()
    for images, labels in loader:
        evaluator.update(model(images.to(device)), labels.to(device))
    return dict(evaluator.summary())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, metric in main().items():
        print(f"{name}: {metric:.4f}")
