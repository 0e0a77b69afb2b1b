"""A tensor or value that is not the one that was saved is refused on every route."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bayesprune as bp
from bayesprune.errors import StorageError
from bayesprune.storage.digests import json_digest, tensor_digest

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]
DTYPES += [torch.complex64, torch.float8_e4m3fn]


def layer() -> nn.Module:
    return nn.Linear(3, 2)


def flip(path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_digests_see_dtype_shape_and_bytes(dtype):
    tensor = torch.tensor([[1.0, 0.0, 1.0]]).to(dtype)
    digests = {tensor_digest(each) for each in (tensor, tensor.T, tensor.flatten(), tensor[:, 1:])}
    assert len(digests) == 4
    assert tensor_digest(tensor.T) == tensor_digest(tensor.clone().T.contiguous())
    assert tensor_digest(tensor[0, 0]) != tensor_digest(tensor[:0])


def test_same_bytes_of_another_dtype_have_another_digest():
    tensor = torch.randn(4)
    assert tensor_digest(tensor) != tensor_digest(tensor.view(torch.int32))


def test_json_digests_know_values_alone():
    assert json_digest({"a": 1, "b": [0.1, None]}) == json_digest(json.loads('{"b":[0.10,null], "a":1}'))
    assert len({json_digest(value) for value in (1, 1.0, True, "1", [1], 0.0, -0.0)}) == 7


@pytest.mark.parametrize("key", [1, 2.5, None, True])
def test_history_loads_again_whatever_json_takes_for_its_keys(tmp_path, key):
    bp.save(layer(), tmp_path, history=dict.fromkeys([9, 10, key], 0.5))
    bp.load(tmp_path, model=layer())


@pytest.mark.parametrize("from_end", range(1, 33))
def test_any_flipped_bit_of_a_tensor_is_found(tmp_path, from_end):
    bp.save(layer(), tmp_path)
    flip(tmp_path / "model.safetensors", -from_end)
    with pytest.raises(StorageError, match=r"1 of 2 tensors of .*model\.safetensors do not have the SHA-256"):
        bp.load(tmp_path, model=layer())


@pytest.mark.parametrize("key", ["history", "spec", "versions"])
def test_changed_record_is_refused(tmp_path, key):
    bp.save(layer(), tmp_path)
    path = tmp_path / "bayesprune.json"
    record = json.loads(path.read_text())
    if key == "spec":
        record["spec"]["attributes"][""]["out_features"] = 3
    else:
        record[key] = {}
    path.write_text(json.dumps(record))
    with pytest.raises(StorageError, match=r"bayesprune\.json does not have the SHA-256"):
        bp.load(tmp_path, model=layer())


def test_keys_that_stand_twice_are_refused(tmp_path):
    bp.save(layer(), tmp_path)
    path = tmp_path / "bayesprune.json"
    path.write_text(path.read_text().replace('"base": null', '"base": {}, "base": null'))
    with pytest.raises(StorageError, match="names a key twice"):
        bp.load(tmp_path, model=layer())


def test_digests_cannot_be_lost(tmp_path):
    bp.save(layer(), tmp_path)
    save_id = json.loads((tmp_path / "bayesprune.json").read_text())["save_id"]
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", {"save_id": save_id})
    with pytest.raises(StorageError, match="holds no digests of its tensors"):
        bp.load(tmp_path, model=layer())
    record = json.loads((tmp_path / "bayesprune.json").read_text())
    del record["sha256"]
    (tmp_path / "bayesprune.json").write_text(json.dumps(record))
    with pytest.raises(StorageError, match=r"bayesprune\.json does not have the SHA-256"):
        bp.load(tmp_path, model=layer())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "bayesprune.json"])
def test_timm_checks_them_too(tmp_path, name):
    timm = pytest.importorskip("timm")
    bp.save(timm.create_model("test_resnet", num_classes=3), tmp_path)
    path = tmp_path / name
    if name == "config.json":
        config = json.loads(path.read_text())
        config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
        path.write_text(json.dumps(config))
    elif name == "bayesprune.json":
        path.write_text(path.read_text().replace('"history": null', '"history": 0'))
    else:
        flip(path, -5)
    with pytest.raises(StorageError, match=f"{name}.* not have the SHA-256"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_transformers_checks_them_too(tmp_path, name):
    """On what its own `save_pretrained` wrote, where there is no bayesprune.json."""
    transformers = pytest.importorskip("transformers")
    from bayesprune.hosts.transformers import follow_saves

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, vocab_size=16))
    follow_saves(bp.to_variational(model)).save_pretrained(tmp_path)
    assert transformers.AutoModel.from_pretrained(tmp_path).layers[0].mlp.up_proj.std == "per_weight"
    path = tmp_path / name
    if name == "config.json":
        path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    else:
        flip(path, -5)
    with pytest.raises(StorageError, match=f"{name}.* not have the SHA-256"):
        transformers.AutoModel.from_pretrained(tmp_path)
