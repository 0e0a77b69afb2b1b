"""Entropy-coded files come back to the last bit, are about as long as their entropy, and damage is named."""

import sys
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.errors import StorageError
from bayesprune.storage.coding import CODED, HEADER, decoded, encoded, entropy_bits, outline
from bayesprune.storage.digests import tensor_header

pytest.importorskip("constriction")

NORMAL = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
KEPT = torch.rand(200, 300, generator=torch.Generator().manual_seed(1))
STEP = 0.375
ROW_STEPS = 2.0 ** -torch.arange(200).remainder(5).view(-1, 1) * (1 + torch.arange(200).remainder(7).view(-1, 1) / 8)


def on_grid(values: Tensor, step: float | Tensor) -> Tensor:
    return (values / step).round() * step + 0


TENSORS = {
    "dense": NORMAL,
    "pruned": NORMAL * (KEPT < 0.1) + 0,
    "float16": NORMAL.half(),
    "bfloat16": NORMAL.bfloat16(),
    "float64": NORMAL.double(),
    "on a grid": on_grid(NORMAL, STEP),
    "on a sparse grid": on_grid(NORMAL, STEP) * (KEPT < 0.1) + 0,
    "a grid for each row": on_grid(NORMAL, ROW_STEPS),
    "a grid of bfloat16": on_grid(NORMAL, STEP).bfloat16(),
    "more than 4,096 steps": on_grid(NORMAL * 1000, STEP),
    "four dimensions": NORMAL.view(20, 10, 20, 15),
    "channels last": NORMAL.view(20, 10, 20, 15).to(memory_format=torch.channels_last),
    "mask": KEPT < 0.1,
    "scalar": torch.tensor(3.25),
    "count": torch.tensor(7),
    "large integers": torch.tensor([2**62, -5, 0]),
    "time stamps": torch.tensor([1700000000, 1700000007, 1700000100]),
    "far below zero": torch.tensor([-(2**31), -(2**31) + 1], dtype=torch.int32),
    "one large integer": torch.tensor(2**31 + 1),
    "close to one": 1 + torch.arange(5, dtype=torch.float64) * 2.0**-52,
    "large steps for each row": torch.tensor([[1, 2], [1, 3]]) * torch.tensor([[2**31 + 1], [2**31 + 3]]),
    "all zero": torch.zeros(3, 4),
    "empty": torch.zeros(0, 4),
    "one": torch.full((5,), 2.5),
    "no number": torch.tensor([float("nan"), float("inf"), -1.0, 0.0]),
    "largest and smallest": torch.tensor([1e-45, 3e38, 0.0]),
    "int8": torch.arange(-128, 128).to(torch.int8),
}


@pytest.mark.parametrize("name", TENSORS)
def test_round_trip(name):
    tensor = TENSORS[name]
    found = decoded(encoded({name: tensor}), "x")[name]
    assert found.dtype == tensor.dtype
    assert found.shape == tensor.shape
    assert torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (found, tensor)))


def test_what_no_reader_would_take_is_not_written():
    with pytest.raises(StorageError, match="what is to be saved"):
        encoded({"x": torch.zeros((1,) * 18)})


def test_names_and_order_are_kept():
    found = decoded(encoded(TENSORS), "x")
    assert list(found) == list(TENSORS)
    assert {name: (t.dtype, t.shape) for name, t in outline(encoded(TENSORS), "x").items()} == {
        name: (t.dtype, t.shape) for name, t in TENSORS.items()
    }


def test_zeros_lose_their_sign_alone():
    found = decoded(encoded({"x": torch.tensor([-0.0, 1.0, 0.0])}), "x")["x"]
    assert torch.equal(found, torch.tensor([0.0, 1.0, 0.0]))
    assert not torch.signbit(found).any()


@pytest.mark.parametrize("name", ["on a grid", "on a sparse grid", "mask", "a grid of bfloat16"])
def test_length_is_within_three_percent_of_the_entropy(name):
    tensor = torch.cat([TENSORS[name]] * 10)
    length = encoded({"x": tensor})[CODED].numel()
    assert length <= 1.03 * entropy_bits(tensor) / 8 + 60


def test_pruned_float32_is_about_its_share():
    """A tenth of the values, of 27 bits each, and where they are."""
    length = encoded({"x": TENSORS["pruned"]})[CODED].numel()
    assert length < 0.105 * NORMAL.nbytes


def test_empty_rows_and_columns_cost_next_to_nothing():
    inside, whole = torch.zeros(20, 30), torch.zeros(400, 600)
    inside[:] = on_grid(NORMAL[:20, :30], STEP) * (KEPT[:20, :30] < 0.3) + 0
    whole[50:70, 100:130] = inside
    lengths = [encoded({"x": tensor})[CODED].numel() for tensor in (inside, whole)]
    assert lengths[1] - lengths[0] < 60


def test_decoding_keeps_up():
    """50 MB of float32 a second of one core, measured in processor time and with room for other machines."""
    tensor = on_grid(torch.cat([NORMAL] * 30), STEP)
    data = encoded({"x": tensor})
    start = time.process_time()
    decoded(data, "x")
    assert tensor.nbytes / (time.process_time() - start) > 10e6


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 5))


@pytest.fixture
def pruned() -> nn.Module:
    torch.manual_seed(0)
    model = bp.to_variational(net())
    bp.prune_weights(model, "weights=0.1")
    return bp.to_deterministic(model)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "1KB"}])
def test_a_saved_model_loads_with_the_same_numbers(pruned, tmp_path, options):
    bp.save(pruned, tmp_path, coding="entropy", **options)
    found = bp.load(tmp_path, model=net())
    assert all(torch.equal(found.state_dict()[name], value) for name, value in pruned.state_dict().items())
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert options or size < sum(value.nbytes for value in pruned.state_dict().values()) / 4


def test_a_variational_model_keeps_its_stds(tmp_path):
    model = bp.to_variational(net(), std="rank_one")
    bp.prune_weights(model, "weights=0.5")
    bp.save(model, tmp_path, coding="entropy")
    found = bp.load(tmp_path, model=net())
    assert all(torch.equal(found.state_dict()[name], value) for name, value in model.state_dict().items())


def test_timm_reads_it(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", num_classes=5).eval()
    bp.save(model, tmp_path, coding="entropy")
    x = torch.randn(1, 3, 32, 32)
    found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(found(x), model(x))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "10KB"}])
def test_transformers_reads_it(tmp_path, cut, options, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=32)).eval()
    tokens = torch.arange(8).view(1, 8)
    if cut:
        importance = pytest.importorskip("torch_pruning").importance.MagnitudeImportance()
        bp.prune_channels(model, tokens, "macs=0.9", importance=importance)
    bp.save(model, tmp_path / "saved", coding="entropy", **options)
    (tmp_path / "temporary").mkdir()
    found, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert torch.equal(found(tokens).logits, model(tokens).logits)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(bp.load(tmp_path / "saved")(tokens).logits, model(tokens).logits)


def test_another_coding_is_refused(tmp_path):
    with pytest.raises(ValueError, match="coding='zip'; expected \"entropy\""):
        bp.save(net(), tmp_path, coding="zip")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_without_constriction(pruned, tmp_path, monkeypatch):
    bp.save(pruned, tmp_path / "coded", coding="entropy")
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(StorageError, match=r"pip install 'bayesprune\[coding\]'"):
        bp.save(pruned, tmp_path / "other", coding="entropy")
    assert not (tmp_path / "other").exists()
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StorageError, match=r"pip install 'bayesprune\[coding\]'"):
        bp.load(tmp_path / "coded", model=model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_file_that_claims_too_much_is_not_decoded():
    data = encoded({"x": torch.zeros(16, 16)})[CODED].numpy().tobytes()
    with pytest.raises(StorageError, match="Nothing is decoded that a file only claims"):
        decoded({CODED: _with_outline(data, b'[["x","F32",1073741824,64]]')}, "x")
    with pytest.raises(StorageError, match="cannot be decoded|other values"):
        decoded({CODED: _with_outline(data, b'[["x","F32",17,17]]')}, "x")
    for text in (
        b"{}",
        b'[["x","F32",-1]]',
        b'[["x","F99",1]]',
        b'[[1,"F32",1]]',
        b'[["x","F32"],["x","F32"]]',
        b"[" * 10**5,
    ):
        with pytest.raises(StorageError):
            decoded({CODED: _with_outline(data, text)}, "x")


def _with_outline(data: bytes, text: bytes) -> Tensor:
    import zlib

    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    found = deflate.compress(text) + deflate.flush()
    end = 4 + int.from_bytes(data[:4], "little")
    return torch.from_numpy(np.frombuffer(len(found).to_bytes(4, "little") + found + data[end:], np.uint8).copy())


@pytest.mark.parametrize("seed", range(40))
def test_a_corrupt_stream_is_refused_or_right(seed):
    """Digests find what happens by accident; this is what stands behind them."""
    names = ("pruned", "on a sparse grid", "a grid for each row", "mask", "count", "no number")
    tensors = {name: TENSORS[name][:40] if TENSORS[name].dim() else TENSORS[name] for name in names}
    data = encoded(tensors)[CODED].clone()
    rng = np.random.default_rng(seed)
    if seed % 4 == 0:
        data = data[: rng.integers(len(data))].clone()
    else:
        for place in rng.integers(len(data) if seed % 4 == 1 else 400, size=1 + seed % 3):
            data[place] ^= 1 << int(rng.integers(8))
    with pytest.raises(StorageError, match="x "):
        decoded({CODED: data}, "x")


def test_an_unknown_coding_is_named(pruned, tmp_path):
    from safetensors.torch import load_file, save_file

    bp.save(pruned, tmp_path, coding="entropy")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, {**HEADER, "coding": "entropy-9", **tensor_header(tensors)})
    with pytest.raises(StorageError, match=r"coded as 'entropy-9'; this version of bayesprune reads 'entropy-1'"):
        bp.load(tmp_path, model=net())
