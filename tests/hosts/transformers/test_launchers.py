"""The same program under `torchrun` and under `accelerate launch`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

import bayesprune as bp
from tests.hosts.transformers.program import INPUTS
from tests.hosts.transformers.test_callback_resume import assert_equal

REPOSITORY = Path(__file__).parents[3]
PROGRAM = ["-m", "tests.hosts.transformers.program"]
# `accelerate launch --cpu` starts several processes with MPI alone; the program chooses the CPU in any case.
ACCELERATE = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", *ACCELERATE, "--dynamo_backend", "no", "--main_process_port", "0"],
}


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_the_launchers_agree(tmp_path):
    results = {}
    for name, launcher in LAUNCHERS.items():
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, "-m", *launcher, *PROGRAM, str(folder)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        first, second = (torch.load(folder / f"result {rank}.pt", weights_only=True) for rank in range(2))
        assert first["processes"] == 2
        assert_equal(second["trained"], first["trained"])
        assert not torch.equal(first["noise"], second["noise"])
        assert (folder / "process 0" / "model.safetensors").is_file()
        others = {path.name for path in (folder / "process 1").rglob("*") if path.is_file()}
        assert others == {"rng_state_1.pth"}, "the Trainer's own file of this process, and no other"
        cut = bp.load(folder / "saved")
        assert cut.config.intermediate_size < 24
        with torch.no_grad():
            assert torch.equal(cut(**INPUTS).logits, first["logits"])
        results[name] = first["trained"]
    assert_equal(results["accelerate"], results["torchrun"])
