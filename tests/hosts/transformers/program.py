"""What a user starts with `torchrun` or `accelerate launch`: train in every process, cut and save in the first."""

import sys
from pathlib import Path

import torch

import bayesprune as bp
from bayesprune.foundation import noise
from bayesprune.hosts.transformers import BayesPruneCallback
from tests.hosts.transformers import tiny

INPUTS = {"input_ids": torch.arange(tiny.LENGTH)[None]}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model = tiny.llama()
    args = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 4}
    trainer = tiny.trainer(
        model, folder / "waiting", BayesPruneCallback(prune="weights=0.7"), ddp_backend="gloo", **args
    )
    trainer.args.output_dir = str(folder / f"process {trainer.args.process_index}")
    trainer.train()
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.save_model()
    logits = None
    if trainer.is_world_process_zero():
        bp.prune_channels(model, INPUTS, target="params=0.8", granularity=("heads", "mlp"), uniform=True)
        bp.save(model, folder / "saved")
        with torch.no_grad():
            logits = model.eval()(**INPUTS).logits
    torch.manual_seed(0)
    drawn = noise.normal((100,), device=torch.device("cpu"), dtype=torch.float32)
    result = {"processes": trainer.args.world_size, "trained": trained, "noise": drawn, "logits": logits}
    torch.save(result, folder / f"result {trainer.args.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
