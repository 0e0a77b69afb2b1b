"""A training's state survives a file without pickle, whatever trains beside the stds; damaged files are refused."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bayesprune as bp
from bayesprune import gates
from bayesprune.errors import StorageError
from bayesprune.priors import ARD, Gaussian, Horseshoe
from bayesprune.storage.state import read_about, read_state, write_state, write_whole


def attached(prior, gated: bool):
    torch.manual_seed(0)
    model = bp.to_variational(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), std="rank_one")
    x = torch.randn(3, 4)
    if gated:
        gates.add_channel_gates(model, x)
        gates.add_weight_gates(model, lr=0.1)
    if prior == "groups":
        prior = ARD(bp.prune.dependency_groups(model, x))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    attachment = bp.attach(optimizer, model, num_data=10, prior=prior)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return attachment


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("prior", [None, Gaussian(centered=True), Horseshoe(global_scale="auto"), "groups"], ids=str)
def test_an_attachments_state_comes_back_from_a_file(prior, gated, tmp_path):
    state = attached(prior, gated).state_dict()
    assert bool(state["complexity"]) == gated
    write_state(tmp_path / "state", state)
    found = read_state(tmp_path / "state")
    assert_same(found, state)
    other = attached(prior, gated)
    other.load_state_dict(found)
    assert_same(other.state_dict(), state)


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "state"
    write_whole(path, lambda partial: partial.write_text("old"))

    def half(partial):
        partial.write_text("half of the n")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_whole(path, half)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("state", "old")]


def test_whatever_a_training_holds_comes_back(tmp_path):
    """Tuples, keys that are no texts, numbers without end, tied, transposed and empty tensors."""
    tied = torch.arange(6.0).view(2, 3)
    state = {
        "random": (3, (1, 2), None),
        "by number": {0: {"step": torch.tensor(2)}, 10: True},
        "numbers": [float("inf"), 0.1, 2**60, "text", []],
        "tensors": [tied, tied, tied.T, torch.empty(0), torch.tensor([1], dtype=torch.uint8)],
    }
    path = tmp_path / "state.safetensors"
    write_state(path, state, {"seed": 1})
    assert_same(read_state(path), state)
    assert read_about(path) == {"seed": 1}
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_others_may_read_it_as_any_new_file(tmp_path):
    other = tmp_path / "other"
    other.touch()
    write_state(tmp_path / "state.safetensors", {"step": torch.tensor(1)})
    assert (tmp_path / "state.safetensors").stat().st_mode == other.stat().st_mode


def test_a_file_that_is_written_half_leaves_the_one_before(tmp_path):
    path = tmp_path / "state.safetensors"
    write_state(path, {"step": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_state(path, {"step": object()})
    assert read_state(path) == {"step": 1}


@pytest.mark.parametrize("damage", ["cut off", "another file", "another version"])
def test_damaged_files_are_refused(damage, tmp_path):
    path = tmp_path / "state.safetensors"
    write_state(path, {"moments": torch.randn(100)})
    whole = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(whole[:-10])
    elif damage == "another file":
        save_file({"moments": torch.randn(100)}, path)
    else:
        path.write_bytes(whole.replace(b'version\\": 3', b'version\\": 2'))
        assert path.read_bytes() != whole
    for read in (read_state, read_about):
        with pytest.raises(StorageError, match=rf"{path.name} (cannot be read|has format version 2; expected 3)"):
            read(path)


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
