"""timm models come back in a fresh process by one call, ours or timm's, and the base they are built from is told."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from safetensors.torch import load_file, save_file
from torch import nn

import bayesprune as bp
from bayesprune.errors import StorageError
from tests.storage.sealing import rewrite

timm = pytest.importorskip("timm")

FRESH_PROCESS = """
import sys, torch, timm
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
directories = sys.argv[1:]
for directory in directories:
    try:
        timm.create_model("local-dir:" + directory, pretrained=True)
        raise SystemExit("loaded without bayesprune")
    except RuntimeError as error:
        assert "bayesprune_pruned" in str(error), error
assert "bayesprune" not in sys.modules
import bayesprune
for directory in directories:
    images = load_file(directory + "/images")["images"]
    with torch.no_grad():
        ours = bayesprune.load(directory)(images)
        timms = timm.create_model("local-dir:" + directory, pretrained=True).eval()(images)
    save_file({"ours": ours, "timm": timms}, directory + "/outputs")
"""


def images(size: int = 64, channels: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def pruned_resnet(**kwargs) -> nn.Module:
    """test_resnet without every third channel of its inner convolutions, with running statistics of its own."""
    model = timm.create_model("test_resnet", num_classes=7, **kwargs).train()
    model(images(channels=kwargs.get("in_chans", 3)))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            removed = list(range(0, block.conv1.out_channels, 3))
            tp.prune_conv_out_channels(block.conv1, removed)
            tp.prune_batchnorm_out_channels(block.bn1, removed)
            tp.prune_conv_in_channels(block.conv2, removed)
    return model.eval()


VIT_ARGS = {"img_size": 64, "depth": 3}


def pruned_vit() -> nn.Module:
    """vit_tiny with MLPs of 100 channels, and one head less in the first block."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **VIT_ARGS)
    for block in model.blocks:
        removed = list(range(100, block.mlp.fc1.out_features))
        tp.prune_linear_out_channels(block.mlp.fc1, removed)
        tp.prune_linear_in_channels(block.mlp.fc2, removed)
    attention = model.blocks[0].attn
    tp.prune_linear_out_channels(attention.qkv, [192 * part + i for part in range(3) for i in range(64)])
    tp.prune_linear_in_channels(attention.proj, list(range(64)))
    attention.num_heads, attention.attn_dim = 2, 128
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.eval()(x)


def by_both_routes(directory: Path) -> list[nn.Module]:
    return [bp.load(directory), timm.create_model(f"local-dir:{directory}", pretrained=True)]


def test_fresh_process_gives_the_same_outputs(tmp_path):
    expected = {}
    for model, args in ((pruned_resnet(), None), (pruned_vit(), VIT_ARGS), (pruned_resnet().bfloat16(), None)):
        directory = tmp_path / str(len(expected))
        x = images(dtype=next(model.parameters()).dtype)
        bp.save(model, directory, model_args=args)
        save_file({"images": x}, directory / "images")
        expected[directory] = outputs(model, x)
    command = [sys.executable, "-W", "error", "-c", FRESH_PROCESS, *map(str, expected)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(bp.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    for directory, output in expected.items():
        found = load_file(directory / "outputs")
        assert torch.equal(found["ours"], output)
        assert torch.equal(found["timm"], output)


def test_attributes_follow(tmp_path):
    bp.save(pruned_vit(), tmp_path, model_args=VIT_ARGS)
    spec = json.loads((tmp_path / "bayesprune.json").read_text())["spec"]
    assert spec["attributes"]["blocks.0.attn"]["num_heads"] == 2
    assert spec["attributes"]["blocks.2.mlp.fc1"] == {"out_features": 100}
    assert "blocks.2.attn" not in spec["attributes"]
    for loaded in by_both_routes(tmp_path):
        assert loaded.blocks[0].attn.num_heads == 2
        assert loaded.blocks[0].mlp.fc2.in_features == 100


@pytest.mark.parametrize(
    ("name", "kwargs", "channels"),
    [
        ("test_resnet", {"in_chans": 1, "num_classes": 3}, 1),
        ("test_resnet", {"global_pool": "catavgmax", "act_layer": "silu"}, 3),
        ("vit_tiny_patch16_224", {"img_size": (64, 64), "depth": 1, "global_pool": "avg", "drop_path_rate": 0.1}, 3),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "depth": 1, "num_classes": 0}, 3),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "depths": (1, 1), "num_heads": (3, 6)}, 3),
    ],
)
def test_constructor_arguments_come_back(tmp_path, name, kwargs, channels):
    model = timm.create_model(name, **kwargs)
    if not hasattr(model, "_model_args"):
        bp.save(model, tmp_path, model_args=kwargs)
    else:
        bp.save(model, tmp_path)
    x = images(channels=channels)
    for loaded in by_both_routes(tmp_path):
        assert torch.equal(outputs(loaded, x), outputs(model, x))
        assert loaded.pretrained_cfg["input_size"][0] == channels
        assert loaded.pretrained_cfg["num_classes"] == model.num_classes


def test_arguments_that_timm_forgot_are_asked_for(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=7, act_layer="silu")
    model.__dict__.pop("_model_args", None)  # as timm did until it began to remember them
    with pytest.raises(StorageError, match="model_args=") as raised:
        bp.save(model, tmp_path / "new")
    assert "blocks.2.norm1.weight (192)" in str(raised.value)
    assert not (tmp_path / "new").exists()
    with pytest.raises(StorageError, match=r"blocks\.0\.mlp\.act: GELU in the model, SiLU recorded"):
        bp.save(model, tmp_path / "new", model_args={"depth": 2})
    bp.save(model, tmp_path / "new", model_args={"depth": 2, "act_layer": "silu"})
    assert torch.equal(outputs(bp.load(tmp_path / "new"), images()), outputs(model, images()))


def test_arguments_that_are_no_json_are_asked_for(tmp_path):
    model = timm.create_model("test_resnet", num_classes=7, act_layer=nn.SiLU)
    if not hasattr(model, "_model_args"):
        pytest.skip("this timm does not remember arguments")
    with pytest.raises(StorageError, match=r"act_layer=<class .*model_args=\{'act_layer': \.\.\.\}"):
        bp.save(model, tmp_path)
    with pytest.raises(StorageError, match="act1: ReLU in the model, SiLU recorded"):
        bp.save(model, tmp_path, model_args={"act_layer": None})
    bp.save(model, tmp_path, model_args={"act_layer": "silu"})
    assert torch.equal(outputs(bp.load(tmp_path), images()), outputs(model, images()))


def test_buffers_outside_the_state_dict_must_be_those_of_the_base(tmp_path):
    model = timm.create_model("test_resnet", num_classes=7)
    model.register_buffer("extra", torch.ones(2), persistent=False)
    with pytest.raises(StorageError, match=r"buffers .*not in the state dict"):
        bp.save(model, tmp_path)


def test_model_with_replaced_layers_is_saved_as_a_plain_one(tmp_path):
    model = timm.create_model("test_resnet", num_classes=7)
    model.fc = nn.Sequential(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(StorageError, match="plain=True"):
        bp.save(model, tmp_path)
    bp.save(model, tmp_path, plain=True)
    dense = timm.create_model("test_resnet", num_classes=7)
    dense.fc = nn.Sequential(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 2))
    assert torch.equal(outputs(bp.load(tmp_path, model=dense), images()), outputs(model, images()))


def test_loaded_models_are_saved_again(tmp_path):
    model = pruned_resnet(in_chans=1)
    bp.save(model, tmp_path / "0")
    for number, loaded in enumerate(by_both_routes(tmp_path / "0"), start=1):
        bp.save(loaded, tmp_path / str(number))
        for again in by_both_routes(tmp_path / str(number)):
            assert torch.equal(outputs(again, images(channels=1)), outputs(model, images(channels=1)))
    configs = [(tmp_path / str(number) / "bayesprune.json").read_text() for number in range(3)]
    assert json.loads(configs[0])["base"] == json.loads(configs[1])["base"] == json.loads(configs[2])["base"]


def test_images_are_prepared_as_before(tmp_path):
    model = pruned_resnet()
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    bp.save(model, tmp_path)
    expected = timm.data.resolve_model_data_config(model)
    assert all(timm.data.resolve_model_data_config(loaded) == expected for loaded in by_both_routes(tmp_path))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, pretrained_cfg_overlay={"crop_pct": 0.5})
    assert timm.data.resolve_model_data_config(other) == {**expected, "crop_pct": 0.5}


def test_variational_timm_model_comes_back(tmp_path):
    model = bp.to_variational(pruned_resnet(), std="rank_one")
    bp.prune_weights(model, "weights=0.5")
    bp.save(model, tmp_path)
    state = model.state_dict()
    for loaded in by_both_routes(tmp_path):
        assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
        assert loaded.layer1[0].conv1.std == "rank_one"
        assert torch.equal(outputs(loaded, images()), outputs(model, images()))


def test_random_numbers_are_left_alone(tmp_path):
    model = pruned_resnet()
    before = torch.get_rng_state()
    bp.save(model, tmp_path)
    by_both_routes(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_untrained_shapes_and_training_options(tmp_path):
    model = pruned_resnet()
    bp.save(model, tmp_path)
    fresh = timm.create_model(f"local-dir:{tmp_path}")
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert not torch.equal(fresh.fc.weight, model.fc.weight)
    dropping = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, drop_rate=0.3, drop_path_rate=0.2)
    assert dropping.training
    assert dropping.drop_rate == 0.3
    assert dropping.layer4[0].drop_path.drop_prob > 0
    assert torch.equal(outputs(dropping, images()), outputs(model, images()))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("num_classes", [5, 0])
def test_another_number_of_classes(tmp_path, name, num_classes):
    """The trunk is the saved one, cut and variational; the head is new, as wide as the trunk is."""
    model = timm.create_model(name, num_classes=7).eval()
    bp.prune_channels(bp.to_variational(model), images(), target="macs=0.5")
    bp.save(model.bfloat16(), tmp_path)
    x = images(dtype=torch.bfloat16)
    features = model.eval().forward_features(x)
    changed = {"num_classes": num_classes, "drop_rate": 0.1}
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **changed).eval()
    assert torch.equal(other.forward_features(x), features)
    output = outputs(other, x)
    if num_classes:
        assert output.shape == (2, num_classes)
    else:
        assert torch.equal(output, model.forward_head(features, pre_logits=True))
    bp.save(other, tmp_path / "again")
    for loaded in by_both_routes(tmp_path / "again"):
        assert torch.equal(outputs(loaded, x), output)
    assert outputs(timm.create_model(f"local-dir:{tmp_path}", **changed), images()).shape == output.shape


@pytest.mark.parametrize("changed", [{"in_chans": 1}, {"in_chans": 1, "num_classes": 5}])
def test_arguments_that_change_shapes_are_refused(tmp_path, changed):
    bp.save(pruned_resnet(), tmp_path)
    with pytest.raises(StorageError, match=f"{next(iter(changed))}.*other shapes than the saved one"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **changed)


def test_unknown_architecture(tmp_path):
    bp.save(pruned_resnet(), tmp_path)
    rewrite(tmp_path / "bayesprune.json", lambda r: r["base"].update(name="resnet_of_tomorrow"))
    with pytest.raises(StorageError, match=f"timm {timm.__version__} has no architecture 'resnet_of_tomorrow'"):
        bp.load(tmp_path)


def test_arguments_that_timm_does_not_take(tmp_path):
    bp.save(pruned_resnet(), tmp_path)
    rewrite(tmp_path / "bayesprune.json", lambda r: r["base"]["args"].update(number_of_legs=4))
    with pytest.raises(StorageError, match=r"does not build 'test_resnet' with .*number_of_legs"):
        bp.load(tmp_path)


def test_saved_arguments_read_no_other_files(tmp_path):
    bp.save(pruned_resnet(), tmp_path)
    rewrite(tmp_path / "bayesprune.json", lambda r: r["base"]["args"].update(checkpoint_path="other.pth"))
    rewrite(tmp_path / "config.json", lambda c: c["model_args"].update(checkpoint_path="other.pth"))
    for load in (bp.load, lambda directory: timm.create_model(f"local-dir:{directory}")):
        with pytest.raises(StorageError, match="hold checkpoint_path; expected only what the architecture"):
            load(tmp_path)


def test_config_of_another_save(tmp_path):
    bp.save(pruned_resnet(), tmp_path)
    config = (tmp_path / "config.json").read_text()
    bp.save(pruned_resnet(), tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(StorageError, match=r"config\.json .*come from two saves"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_damaged_base(tmp_path):
    bp.save(pruned_resnet(), tmp_path)
    rewrite(tmp_path / "bayesprune.json", lambda r: r["base"].update(args=[1]))
    with pytest.raises(StorageError, match=r"bayesprune\.json: base holds no 'args' of type dict"):
        bp.load(tmp_path)


def test_damaged_files_are_told_to_timm_as_well(tmp_path):
    bp.save(pruned_resnet(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(StorageError, match=r"model\.safetensors cannot be read"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_entry_point_is_no_architecture():
    with pytest.raises(StorageError, match="not an architecture to create by name"):
        timm.create_model("bayesprune_pruned")


def test_weights_from_elsewhere_are_refused(tmp_path):
    bp.save(pruned_resnet(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    cfg = {**config["pretrained_cfg"], "source": "hf-hub", "hf_hub_id": "someone/model"}
    with pytest.raises(StorageError, match="not from 'hf-hub'"):
        timm.create_model("bayesprune_pruned", pretrained=True, pretrained_cfg=cfg, **config["model_args"])


def test_missing_timm_is_named(monkeypatch):
    host = importlib.import_module("bayesprune.hosts.timm.reload")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"needs timm >= 1\.0\.23 .*pip install 'bayesprune\[timm\]'"):
        importlib.reload(host)


def test_buffers_that_a_forward_makes_come_back(tmp_path):
    model = timm.create_model("convit_tiny", img_size=32, num_classes=7, depth=2, local_up_to_layer=1)
    expected = outputs(model, images(32))
    assert model.blocks[0].attn.rel_indices.shape == (1, 4, 4, 3)
    bp.save(model, tmp_path)
    for loaded in by_both_routes(tmp_path):
        assert torch.equal(loaded.blocks[0].attn.rel_indices, model.blocks[0].attn.rel_indices)
        assert torch.equal(outputs(loaded, images(32)), expected)
    untrained = timm.create_model(f"local-dir:{tmp_path}")
    assert outputs(untrained, images(32)).isfinite().all()
