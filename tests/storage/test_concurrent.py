"""Several processes may save to one directory: one whole result stays, and nobody loads a mixture."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.errors import StorageError

SAVES = """
import sys, time
import torch
import bayesprune as bp
directory, value, size, seconds = sys.argv[1:]
model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4)))
for parameter in model.parameters():
    torch.nn.init.constant_(parameter, float(value))
print("ready", flush=True)
sys.stdin.readline()
end, count = time.monotonic() + float(seconds), 0
while time.monotonic() < end:
    bp.save(model, directory, max_shard_size=int(size))
    count += 1
print(count)
"""


def net() -> nn.Module:
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))


def value_of(directory: Path) -> float:
    """The one number in all tensors."""
    values = {value for tensor in bp.load(directory, model=net()).parameters() for value in tensor.unique().tolist()}
    assert len(values) == 1, f"a mixture of the saves of {values}"
    return values.pop()


def start(directory: Path, value: int, size: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SAVES, str(directory), str(value), str(size), "2"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(10**6, 10**6), (1500, 1500), (10**6, 1500)])
def test_two_processes_save_while_a_third_loads(tmp_path, sizes):
    """One file, several, and saves that remove each other's files."""
    with ExitStack() as stack:
        saves = [stack.enter_context(start(tmp_path, value, size)) for value, size in enumerate(sizes, start=1)]
        for process in saves:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in saves:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        loads = {"whole": 0, "refused": 0}
        while any(process.poll() is None for process in saves):
            try:
                assert value_of(tmp_path) in (1.0, 2.0)
                loads["whole"] += 1
            except StorageError:
                loads["refused"] += 1
        counts = [int(process.communicate()[0]) for process in saves]
    assert [process.returncode for process in saves] == [0, 0]
    assert min(counts) >= 1
    assert value_of(tmp_path) in (1.0, 2.0), loads
    assert not list(tmp_path.glob(".*")), "temporary files were left"


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks on directories")
def test_a_save_waits_for_another_one_to_rename(tmp_path):
    import fcntl
    import os
    import threading

    bp.save(net(), tmp_path)
    before = (tmp_path / "bayesprune.json").read_bytes()
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    saving = threading.Thread(target=bp.save, args=(net(), tmp_path))
    saving.start()
    saving.join(0.3)
    assert saving.is_alive()
    assert (tmp_path / "bayesprune.json").read_bytes() == before
    os.close(held)
    saving.join(30)
    assert not saving.is_alive()
    assert (tmp_path / "bayesprune.json").read_bytes() != before
    assert torch.isfinite(bp.load(tmp_path, model=net())[0].weight).all()
