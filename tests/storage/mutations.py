"""Ways in which the files of a saved directory may be damaged, by accident or on purpose; each is a seeded draw."""

import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bayesprune.storage.coding import CODED
from bayesprune.storage.digests import tensor_header
from tests.storage.sealing import reseal

DEPTH = 100_000
STRANGE = [None, True, False, 0, 1, -1, 3, 7, 0.5, 1e-3, "", "weight", "float16", "0.weight", "relu", [], {}, [[]], [3]]
STRANGE += [{"tuple": [1]}, {"a": {"b": 1}}, {"std": "x", "estimator": "y"}, "../other", "flipout", "test_vit"]
HUGE = [2**31, 2**40, 2**62, 2**63, 10**30, -(2**62), 1e308, [2**40], [2**31, 2**31], [0, 2**62], [2**62, 0]]
PATHS = ["../other/model.safetensors", "/etc/passwd", "..", ".", "", "/dev/zero", "a/b.safetensors", "~", "a\0b"]
PATHS += ["..\\model.safetensors", "C:\\model.safetensors", "file:///etc/passwd", "./model.safetensors", "x" * 5000]
PICKLE = b"cposix\nsystem\n(S'touch CODE_RAN'\ntR."
MARK = "placeholder of a mutation"
UNMAPPED = "blip_text_model"  # a config of transformers that AutoModel knows no class for, so that it would take others


def truncate(rng: random.Random, directory: Path, other: Path) -> None:
    path = one_of(rng, directory)
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def flip_bits(rng: random.Random, directory: Path, other: Path) -> None:
    path = one_of(rng, directory)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(rng.choice((len(data), min(64, len(data)))))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def change_value(rng: random.Random, directory: Path, other: Path) -> None:
    in_json(rng, directory, lambda node, key: node.__setitem__(key, rng.choice(STRANGE)))


def nudge_value(rng: random.Random, directory: Path, other: Path) -> None:
    """A value of the same type."""

    def change(node: Any, key: Any) -> None:
        old = node[key]
        if isinstance(old, bool):
            node[key] = not old
        elif isinstance(old, (int, float)):
            node[key] = old + rng.choice((1, -1, 0.5)) if rng.random() < 0.8 else type(old)(2 * old)
        elif isinstance(old, str):
            node[key] = old[:-1] if rng.random() < 0.5 else old + "x"
        else:
            node[key] = type(old)() if isinstance(old, (list, dict)) else 1

    in_json(rng, directory, change)


def delete_value(rng: random.Random, directory: Path, other: Path) -> None:
    in_json(rng, directory, lambda node, key: node.__delitem__(key))


def rename_key(rng: random.Random, directory: Path, other: Path) -> None:
    def change(node: Any, key: Any) -> None:
        if isinstance(node, dict):
            node[rng.choice((f"{key}x", key[1:], "weight", "sha256"))] = node.pop(key)
        else:
            node.reverse()

    in_json(rng, directory, change)


def swap_values(rng: random.Random, directory: Path, other: Path) -> None:
    path = one_of(rng, directory, ".json")
    value = json.loads(path.read_text())
    (first, a), (second, b) = rng.choice(list(nodes(value))), rng.choice(list(nodes(value)))
    first[a], second[b] = json.loads(json.dumps(second[b])), json.loads(json.dumps(first[a]))
    path.write_text(json.dumps(value))


def duplicate_key(rng: random.Random, directory: Path, other: Path) -> None:
    path = one_of(rng, directory, ".json")
    value = json.loads(path.read_text())
    node, key = rng.choice([(node, key) for node, key in nodes(value) if isinstance(node, dict)])
    twice = f"{json.dumps(key)}: {json.dumps(rng.choice(STRANGE))}"
    items = [*node.items()]
    items.insert(rng.choice((0, len(items))), (MARK, 0))
    node.clear()
    node.update(items)
    path.write_text(json.dumps(value).replace(f'"{MARK}": 0', twice))


def nest(rng: random.Random, directory: Path, other: Path) -> None:
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    depth = rng.choice((100, 900, 5_000, DEPTH))
    deep = opening * depth + "1" + closing * (depth if rng.random() < 0.8 else 0)
    if rng.random() < 0.2:
        one_of(rng, directory, ".json").write_text(deep)
    else:
        path = in_json(rng, directory, lambda node, key: node.__setitem__(key, MARK))
        path.write_text(path.read_text().replace(json.dumps(MARK), deep))


def huge_number(rng: random.Random, directory: Path, other: Path) -> None:
    in_json(rng, directory, lambda node, key: node.__setitem__(key, rng.choice(HUGE)), only=(int, float, list))


def not_finite(rng: random.Random, directory: Path, other: Path) -> None:
    path = in_json(rng, directory, lambda node, key: node.__setitem__(key, MARK), only=(int, float))
    text = rng.choice(("NaN", "Infinity", "-Infinity", "1e999", "-0.0", "9" * 5000, "1" + "0" * 400, "0x10", "1_000"))
    path.write_text(path.read_text().replace(json.dumps(MARK), text))


def path_trick(rng: random.Random, directory: Path, other: Path) -> None:
    index = sorted(directory.glob("*.index.json"))
    if index and rng.random() < 0.5:
        value = json.loads(index[0].read_text())
        every = rng.random() < 0.3
        name = rng.choice([*PATHS, str(other / "model-00001-of-00002.safetensors")])
        for key in list(value["weight_map"]) if every else [rng.choice(list(value["weight_map"]))]:
            value["weight_map"][key] = name
        index[0].write_text(json.dumps(value))
    else:
        in_json(rng, directory, lambda node, key: node.__setitem__(key, rng.choice(PATHS)), only=(str,))


def link(rng: random.Random, directory: Path, other: Path) -> None:
    path = one_of(rng, directory)
    outside = directory.parent / "outside"
    outside.write_bytes(path.read_bytes() if rng.random() < 0.1 else rng.randbytes(100))
    targets = (other / path.name, Path("/dev/zero"), Path("/etc/passwd"), path, outside, other, Path("../outside"))
    path.unlink()
    path.symlink_to(rng.choice(targets))


def lose_file(rng: random.Random, directory: Path, other: Path) -> None:
    one_of(rng, directory).unlink()


def add_file(rng: random.Random, directory: Path, other: Path) -> None:
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "adapter_config.json")
    names += ("config.json", "generation_config.json", "modeling.py", "model-00009-of-00009.safetensors")
    path = directory / rng.choice(names)
    path.write_bytes(rng.choice((b"", b"{}", PICKLE, b"import os; os.system('touch CODE_RAN')", rng.randbytes(50))))
    if rng.random() < 0.5 and path.suffix in (".bin", ".py"):
        for tensors in directory.glob("*.safetensors"):
            tensors.unlink()


def mix_saves(rng: random.Random, directory: Path, other: Path) -> None:
    path = one_of(rng, directory)
    shutil.copy(other / path.name, path)


def replace_file(rng: random.Random, directory: Path, other: Path) -> None:
    paths = [one_of(rng, directory) for _ in range(rng.choice((1, 1, 3)))]
    for path in paths:
        path.write_bytes(rng.choice((b"", b"\0", b"{}", b"null", PICKLE, bytes(200), rng.randbytes(300))))


def no_regular_file(rng: random.Random, directory: Path, other: Path) -> None:
    path = one_of(rng, directory)
    path.unlink()
    if rng.random() < 0.5:
        path.mkdir()
    else:
        os.mkfifo(path)


def change_header(rng: random.Random, directory: Path, other: Path) -> None:
    """The header of a file of tensors: shapes, dtypes, offsets, names, metadata, and its own length."""
    path = one_of(rng, directory, ".safetensors")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    first, second = header[rng.choice(names)], header[rng.choice(names)]
    kind = rng.randrange(8)
    if kind == 0:
        first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
    elif kind == 1:
        first["shape"] = rng.choice(
            (first["shape"][::-1], [0], [2**40, 2**40], [2**62], [-1], [*first["shape"], 1], [])
        )
    elif kind == 2:
        first["dtype"] = rng.choice(("I32", "F16", "U8", "F64", "BF16", "F99"))
    elif kind == 3:
        header[rng.choice(("x", *names))] = header.pop(rng.choice(names))
    elif kind == 4:
        first["data_offsets"] = [rng.choice((0, 8, 2**40, 2**63)), rng.choice((0, 16, 2**40, 2**64 - 1))]
    elif kind == 5:
        header["__metadata__"][rng.choice(("save_id", "sha256", "format"))] = rng.choice(("", "pt", "{}", "[" * DEPTH))
    elif kind == 6:
        header["__metadata__"].pop(rng.choice(list(header["__metadata__"])))
    text = json.dumps(header).encode()
    size = rng.choice((0, 1, 2**40, 2**63, len(text) - 1, len(text) + 8)) if kind == 7 else len(text)
    path.write_bytes(struct.pack("<Q", size) + text + rest)


def change_tensors(rng: random.Random, directory: Path, other: Path) -> None:
    """Bytes of a file of tensors, whose digests then fit: of a coded one its outline, its stream, what it claims."""
    path = one_of(rng, directory, ".safetensors")
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    data = bytearray(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if name == CODED and rng.random() < 0.5:
        end = 4 + int.from_bytes(data[:4], "little")
        entries = json.loads(zlib.decompress(bytes(data[4:end]), -15))
        node, key = rng.choice(list(nodes(entries)))
        node[key] = rng.choice((*STRANGE, *HUGE, 10**4, 10**6, 10**9))
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        text = deflate.compress(json.dumps(entries).encode()) + deflate.flush()
        data[:end] = len(text).to_bytes(4, "little") + text
    elif data:
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(rng.choice((len(data), min(400, len(data)))))] = rng.randrange(256)
    if name == CODED and rng.random() < 0.2:
        data = data[: rng.randrange(len(data))]
    found = torch.frombuffer(data or bytearray(1), dtype=torch.uint8)[: len(data)]
    tensors[name] = found if name == CODED else found.view(tensors[name].dtype).view(tensors[name].shape)
    save_file(tensors, path, {**header, **tensor_header(tensors)})


def resealed(rng: random.Random, directory: Path, other: Path) -> None:
    """A changed value with digests that fit: another model, if any; judged by time, memory and the kind of error."""
    rng.choice((change_value, nudge_value, delete_value, swap_values, huge_number, huge_number))(rng, directory, other)
    reseal(directory)


def lead_out(rng: random.Random, directory: Path, other: Path) -> None:
    """Keys that name code, kernels, other files, other directories or a hub, with digests that fit."""
    (directory / "modeling.py").write_text("import os\nos.system('touch CODE_RAN')\nclass Evil: pass\n")
    outside = directory.parent / "outside.pth"
    outside.write_bytes(PICKLE)
    code = dict.fromkeys(("AutoModel", "AutoConfig", "AutoModelForCausalLM", "AutoBackbone"), "modeling.Evil")
    unknown = {"model_type": UNMAPPED, "attribute_map": {"x": "auto_map", "y": "_name_or_path"}, "y": str(directory)}
    keys: list[dict[str, Any]] = [
        {"model_type": UNMAPPED, "auto_map": code, "name_or_path": str(directory)},
        {**unknown, "x": code},
        {"attribute_map": {"x": "auto_map"}, "x": code},
        {"attribute_map": {"x": "_attn_implementation_internal"}, "x": "someone/kernel"},
        {"attribute_map": {"__dict__": "x"}, "x": {}, "auto_map": code},
        *({name: "someone/kernel"} for name in ("attn_implementation", "_attn_implementation")),
        {"_attn_implementation_internal": "flash_attention_2"},
        {"experts_implementation": "someone/kernel"},
        {"backbone": "someone/net", "backbone_config": None, "use_pretrained_backbone": True},
        {"backbone": str(other), "backbone_config": None},
        {"model_type": "timm_wrapper", "architecture": f"local-dir:{other}"},
        {"model_type": "timm_wrapper", "architecture": "test_resnet", "model_args": {"checkpoint_path": str(outside)}},
        {"model_args": {"pretrained": True}},
        {"model_args": {"checkpoint_path": str(outside)}},
        *({name: str(outside)} for name in ("checkpoint_path", "pretrained", "file", "url", "cache_dir")),
        {"pretrained_cfg": {"file": str(outside)}, "pretrained_cfg_overlay": {"file": str(outside)}},
        {"architecture": f"local-dir:{other}"},
        {"architecture": "hf-hub:someone/net"},
        {"name": f"local-dir:{other}"},
        {"transformers_weights": "../outside.pth"},
        {"name_or_path": str(other), "_name_or_path": str(other), "target_lang": "../other/x"},
        {"custom_pipelines": {"text": {"impl": "modeling.Evil"}}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"library": "someone/else"},
        {"configuration_files": ["config.4.0.0.json"]},
        {"custom_generate": "modeling.py", "_from_model_config": True},
    ]
    chosen = rng.choice(keys)
    if rng.random() < 0.2:
        chosen = {"text_config": chosen, "vision_config": [chosen], "sub": [[chosen]]}
    path = one_of(rng, directory, ".json")
    value = json.loads(path.read_text())
    inside = [node[key] for node, key in nodes(value) if isinstance(node[key], dict)]
    likely = [node for node in inside if node.keys() & {"model_type", "architecture", "base_args", "hidden_size"}]
    likely += [value["base"]["args"]] if isinstance(value.get("base"), dict) else [value]
    rng.choice(likely if rng.random() < 0.7 else [value, *inside]).update(chosen)
    path.write_text(json.dumps(value))
    reseal(directory)


def bomb(rng: random.Random, directory: Path, other: Path) -> None:
    """Small files that ask for much: long lists, nested models, huge counts, names that nothing has."""
    path = one_of(rng, directory, ".json")
    value = json.loads(path.read_text())
    kind = rng.randrange(5)
    if kind == 0:
        text = rng.choice(("[]", "{}", "0", '{"a":[]}'))
        node, key = rng.choice(list(nodes(value)))
        node[key] = MARK
        path.write_text(
            json.dumps(value).replace(json.dumps(MARK), f"[{','.join([text] * rng.choice((10**4, 10**5, 10**6)))}]")
        )
        if rng.random() < 0.5:
            return
    elif kind == 1:
        for node, key in list(nodes(value)):
            if key in ("base_args", "args") and isinstance(node[key], dict):
                inner = {"base": "test_resnet", "base_args": {}, "spec": {}}
                for level in range(14):
                    inner = {"base": "bayesprune_pruned", "base_args": inner, "spec": {}, "drop_rate": level / 99}
                node[key] = inner
            elif key in ("base", "name") and isinstance(node[key], str):
                node[key] = "bayesprune_pruned"
        path.write_text(json.dumps(value))
    elif kind == 2:
        places = [(node, key) for node, key in nodes(value) if type(node[key]) is int]
        for node, key in rng.sample(places, min(len(places), rng.choice((1, 1, 3)))):
            node[key] = rng.choice((10**4, 10**5, 10**6, 2**27, 2**28, 2**28 + 1, 2**31, 10**12, 10**30))
        path.write_text(json.dumps(value))
    elif kind == 3:
        names = {"act_layer": "nothing", "norm_layer": "nothing", "hidden_act": "nothing", "dtype": "nothing"}
        names |= {"depths": [10**6], "num_hidden_layers": 10**7, "num_labels": 10**9, "num_classes": 10**8}
        names |= {"estimator": "nothing", "std": "nothing", "block_fn": "nothing", "model_type": "nothing"}
        name = rng.choice(list(names))
        inside = [node[key] for node, key in nodes(value) if isinstance(node[key], dict)]
        for node in [node for node in inside if name in node] or [rng.choice([value, *inside])]:
            node[name] = names[name]
        path.write_text(json.dumps(value))
    else:
        deep: Any = 1
        for _ in range(rng.choice((90, 200, 300))):
            deep = {"tuple": [deep]} if rng.random() < 0.5 else {"text_config": deep, "model_type": "llama"}
        node, key = rng.choice(list(nodes(value)))
        node[key] = deep
        path.write_text(json.dumps(value))
    reseal(directory)


MUTATIONS: dict[str, Callable[[random.Random, Path, Path], None]] = {
    "truncated file": truncate,
    "flipped bits": flip_bits,
    "JSON value of another type": change_value,
    "JSON value nudged": nudge_value,
    "JSON value deleted": delete_value,
    "JSON key renamed, list reversed": rename_key,
    "JSON values swapped": swap_values,
    "duplicate key": duplicate_key,
    "deep nesting": nest,
    "huge number": huge_number,
    "NaN, infinity, odd numbers": not_finite,
    "path trick": path_trick,
    "symbolic link": link,
    "missing file": lose_file,
    "extra file, pickle, code": add_file,
    "file of another save": mix_saves,
    "file of something else, empty file": replace_file,
    "directory or pipe": no_regular_file,
    "safetensors header": change_header,
    "resealed": resealed,
    "resealed tensors": change_tensors,
    "resealed, leading out": lead_out,
    "resealed, asking for much": bomb,
}
CRAFTED = ("resealed", "resealed tensors", "resealed, leading out", "resealed, asking for much")


def one_of(rng: random.Random, directory: Path, ending: str = "") -> Path:
    """A file of the directory."""
    return rng.choice(sorted(path for path in directory.iterdir() if path.name.endswith(ending)))


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place inside a JSON value, as the object or list that holds it and the key."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, (dict, list)):
            yield from nodes(item)


def in_json(
    rng: random.Random, directory: Path, change: Callable[[Any, Any], None], only: tuple[type, ...] = ()
) -> Path:
    """Changes one value of a JSON file; first its top keys are drawn, so that long lists do not take all draws."""
    path = one_of(rng, directory, ".json")
    value = json.loads(path.read_text())
    places = [place for place in nodes(value) if not only or type(place[0][place[1]]) in only]
    if places:
        top = [place for place in places if place[0] is value]
        change(*rng.choice(top if top and rng.random() < 0.2 else places))
    path.write_text(json.dumps(value))
    return path
