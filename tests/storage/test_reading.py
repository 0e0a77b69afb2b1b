"""A small file cannot make a load long or large, and whatever it says wrongly is a StorageError at the load."""

import json
import time

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.errors import StorageError
from bayesprune.estimators import ESTIMATORS
from bayesprune.storage import parsing
from bayesprune.storage.base import BaseModel, LibraryAdapter, build, register_adapter
from bayesprune.storage.parsing import MAX_DEPTH, MAX_VALUES, parse_json
from bayesprune.storage.reading import MAX_INTEGER, bounded_building, check_integers
from tests.storage.sealing import reseal, rewrite


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


@pytest.fixture
def saved(tmp_path):
    bp.save(bp.to_variational(net()), tmp_path)
    return tmp_path


@pytest.mark.parametrize("item", ["[]", "{}", '""', '{"a":[]}'])
def test_long_lists_are_refused_before_they_are_made(saved, item):
    text = (saved / "bayesprune.json").read_text()
    (saved / "bayesprune.json").write_text(
        text.replace('"history": null', f'"history": [{",".join([item] * 2 * 10**6)}]')
    )
    start = time.process_time()
    with pytest.raises(StorageError, match="values; expected at most|has more than"):
        bp.load(saved, model=net())
    assert time.process_time() - start < 10


def test_depth_and_number_of_values():
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_json(deep, "it") is not None
    with pytest.raises(StorageError, match="it is nested too deeply"):
        parse_json(b"[" + deep + b"]", "it")
    many = b"[" + b"1," * (MAX_VALUES - 2) + b"1]"
    assert len(parse_json(many, "it")) == MAX_VALUES - 1
    with pytest.raises(StorageError, match="some 1,000,001 values"):
        parse_json(b"[1," + many[1:-2] + b"1,1]", "it")


def test_digests_of_tensors_are_bounded_too(saved):
    from safetensors.torch import load_file, save_file

    path = saved / "model.safetensors"
    save_id = json.loads((saved / "bayesprune.json").read_text())["save_id"]
    save_file(load_file(path), path, metadata={"save_id": save_id, "sha256": f"[{'[],' * 10**6}1]"})
    with pytest.raises(StorageError, match="'sha256' in the header of .* values"):
        bp.load(saved, model=net())


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("history", [nested(MAX_DEPTH + 1), [0] * 1000], ids=["deep", "long"])
def test_what_could_not_be_read_again_is_not_written(tmp_path, monkeypatch, history):
    monkeypatch.setattr(parsing, "MAX_VALUES", 1000)
    with pytest.raises(StorageError, match="what is to be saved"):
        bp.save(net(), tmp_path / "new", history=history)
    assert not (tmp_path / "new").exists()
    with pytest.raises(TypeError, match="not a JSON value"):
        bp.save(net(), tmp_path / "new", history=nested(5000))


@pytest.mark.parametrize(
    ("key", "name"), [("estimator", "dropout"), ("std", "nothing"), ("estimator", ""), ("std", "")]
)
def test_unknown_names_are_refused_at_the_load(saved, key, name):
    rewrite(saved / "bayesprune.json", lambda record: record["spec"]["variational"]["2"].update({key: name}))
    with pytest.raises(StorageError, match="expected a known std and estimator"):
        bp.load(saved, model=net())


def test_every_known_estimator_loads(saved):
    for name in ESTIMATORS:
        bp.save(bp.to_variational(net(), estimator=name), saved)
        assert bp.load(saved, model=net())[2].estimator == name


@pytest.mark.parametrize("value", [MAX_INTEGER + 1, -(10**30), [1, [2**40]], {"a": {"b": 10**12}}])
def test_whole_numbers_that_are_no_sizes(value):
    with pytest.raises(StorageError, match="expected at most 268,435,456"):
        check_integers({"width": value}, "it")
    check_integers({"rope_theta": 10**9, "seed": 2**63, "width": MAX_INTEGER, "eps": 1e300, "ok": True}, "it")


@pytest.mark.parametrize("kind", ["modules", "parameters", "buffers", "a large one"])
def test_building_stops_where_it_is_out_of_proportion(kind):
    saved = {"weight": torch.zeros(100)}

    def grow():
        owner = nn.Module()
        for number in range(10**6):
            if kind == "modules":
                owner.add_module(str(number), nn.Identity())
            elif kind == "parameters":
                owner.register_parameter(str(number), nn.Parameter(torch.zeros(1)))
            elif kind == "buffers":
                owner.register_buffer(str(number), torch.zeros(1))
            else:
                owner.register_buffer(str(number), torch.empty(2**29, device="meta"))

    with pytest.raises(StorageError, match="out of all proportion"), bounded_building(saved, 1):
        grow()
    with bounded_building(saved, 1):
        nn.Sequential(*(nn.Linear(2, 2) for _ in range(100)))
    nn.Sequential(*(nn.Identity() for _ in range(3000)))  # outside, nothing is counted


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError("x"), RecursionError("x"), MemoryError("x")])
def test_whatever_a_library_raises_is_a_storage_error(error):
    def fail(base):
        raise error

    register_adapter(LibraryAdapter("failing", lambda *_: None, fail, lambda *_: {}))
    with pytest.raises(StorageError, match=f"failing does not build 'net' with .*{type(error).__name__}"):
        build(BaseModel("failing", "net", {"a": 1}))


TIMM = {
    "an activation": {"act_layer": "nothing"},
    "an argument": {"nothing": 1},
    "a norm": {"norm_layer": "nothing"},
    "classes": {"num_classes": 10**12},
    "many classes": {"num_classes": 2 * 10**7},
    "layers": {"layers": [10**6]},
    "a file": {"checkpoint_path": "x.pth"},
}


@pytest.mark.parametrize("kind", TIMM)
def test_wrong_arguments_of_timm(tmp_path, kind):
    timm = pytest.importorskip("timm")
    bp.save(timm.create_model("test_resnet", num_classes=3), tmp_path)
    rewrite(tmp_path / "bayesprune.json", lambda record: record["base"]["args"].update(TIMM[kind]))
    start = time.process_time()
    with pytest.raises(StorageError):
        bp.load(tmp_path)
    change = TIMM[kind]
    rewrite(tmp_path / "config.json", lambda config: config["model_args"]["base_args"].update(change))
    with pytest.raises(StorageError):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=False)
    assert time.process_time() - start < 20


def test_shapes_of_no_tensor(tmp_path):
    timm = pytest.importorskip("timm")
    bp.save(timm.create_model("test_resnet", num_classes=3), tmp_path)
    name, huge = "fc.weight", [2**62, 2**62]
    rewrite(tmp_path / "config.json", lambda config: config["model_args"]["spec"]["shapes"].update({name: huge}))
    with pytest.raises(StorageError):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=False)
    args = json.loads((tmp_path / "config.json").read_text())["model_args"]
    with pytest.raises(StorageError, match="spec has shapes of no tensor"):
        timm.create_model("bayesprune_pruned", pretrained=False, pretrained_cfg={"input_size": (3, 32, 32)}, **args)


def test_saved_models_inside_saved_models(tmp_path):
    """Each would be built twice for every level of nesting."""
    timm = pytest.importorskip("timm")
    bp.save(timm.create_model("test_resnet", num_classes=3), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    args = config["model_args"]
    for level in range(12):
        inner = args | {"drop_rate": level / 20}
        args = args | {"base": "bayesprune_pruned", "base_args": inner}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": args}))
    rewrite(tmp_path / "bayesprune.json", lambda r: r["base"].update(name="bayesprune_pruned", args=args))
    reseal(tmp_path)
    for load in (
        bp.load,
        lambda directory: timm.create_model(f"local-dir:{directory}", pretrained=True, drop_rate=0.3),
    ):
        with pytest.raises(StorageError, match="has no architecture 'bayesprune_pruned'"):
            load(tmp_path)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**5}, {"vocab_size": 2**27}, {"intermediate_size": 10**9}])
def test_layers_of_transformers_out_of_proportion(tmp_path, change):
    pytest.importorskip("transformers")
    from tests.hosts.transformers.saved import bert

    bp.save(bert(), tmp_path)
    rewrite(tmp_path / "bayesprune.json", lambda record: record["base"]["args"]["config"].update(change))
    start = time.process_time()
    with pytest.raises(StorageError, match="out of all proportion|expected at most"):
        bp.load(tmp_path)
    assert time.process_time() - start < 20
