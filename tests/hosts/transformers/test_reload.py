"""transformers' own `from_pretrained` and `save_pretrained`, in this process and in fresh ones."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bayesprune as bp
from bayesprune.errors import StorageError, UnsupportedModelError
from bayesprune.layers import VariationalLayer, variational_layers

transformers = pytest.importorskip("transformers")
pytest.importorskip("bayesprune.hosts.transformers")

from bayesprune.hosts.transformers import follow_saves  # noqa: E402
from tests.hosts.transformers.families import FAMILIES, GROUPED, build  # noqa: E402
from tests.hosts.transformers.saved import (  # noqa: E402
    TOKENS,
    bert,
    config,
    cut,
    cut_between,
    gpt2,
    masked,
    outputs,
    rewrite,
    same_state,
)

CLASSIFIER = transformers.AutoModelForSequenceClassification
ROOT = Path(bp.__file__).parents[1]

FRESH_PROCESS = """
import sys, torch
import transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
auto = transformers.AutoModelForSequenceClassification
cut, masked, shards = sys.argv[1:]
try:
    auto.from_pretrained(cut)
    raise SystemExit("a cut model was loaded without bayesprune")
except RuntimeError as error:
    assert "mismatch" in str(error), error
assert "bayesprune" not in sys.modules
import bayesprune
for directory in (cut, masked, shards):
    tokens = load_file(directory + "/tokens")["tokens"]
    with torch.no_grad():
        model = auto.from_pretrained(directory)
        found = {"theirs": model(tokens).logits}
        if directory != shards:
            found["ours"] = bayesprune.load(directory)(tokens).logits
    save_file(found, directory + "/outputs")
"""

IMPORTS = """
import sys
import bayesprune
assert "transformers" not in sys.modules, "import bayesprune imports transformers"
from transformers import BertModel
assert "bayesprune.hosts.transformers.reload" in sys.modules
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "bayesprune" in AUTO_QUANTIZER_MAPPING
assert "torch_pruning" not in sys.modules, "loading needs none of it"
waiting = [finder.host.library for finder in sys.meta_path if type(finder).__module__.startswith("bayesprune")]
assert "transformers" not in waiting
"""

LOADS = """
import sys
import bayesprune
import torch
assert "transformers" not in sys.modules
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
model = bayesprune.load(sys.argv[1])
tokens = load_file(sys.argv[1] + "/tokens")["tokens"]
with torch.no_grad():
    save_file({"ours": model(tokens).logits}, sys.argv[1] + "/outputs")
"""


def run(program: str, *arguments: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_fresh_process_gives_the_same_outputs(tmp_path):
    models = {"cut": cut(bert()), "masked": masked(cut(bert()), std="rank_one"), "shards": follow_saves(cut(bert()))}
    for name, model in models.items():
        if name == "shards":
            model.save_pretrained(tmp_path / name, max_shard_size="10KB")
        else:
            bp.save(model, tmp_path / name)
        save_file({"tokens": TOKENS}, tmp_path / name / "tokens")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    run(FRESH_PROCESS, *(tmp_path / name for name in models))
    for name, model in models.items():
        for found in load_file(tmp_path / name / "outputs").values():
            assert torch.equal(found, outputs(model)), name


def test_transformers_is_imported_by_the_user_alone():
    run(IMPORTS)


def test_load_is_enough_to_bring_transformers_in(tmp_path):
    model = cut(bert())
    bp.save(model, tmp_path)
    save_file({"tokens": TOKENS}, tmp_path / "tokens")
    run(LOADS, tmp_path)
    assert torch.equal(load_file(tmp_path / "outputs")["ours"], outputs(model))


def test_variational_model_is_variational_again(tmp_path):
    model = masked(cut(bert()), std="per_channel")
    bp.save(model, tmp_path)
    loaded = CLASSIFIER.from_pretrained(tmp_path)
    assert same_state(loaded, model)
    layer = loaded.bert.encoder.layer[1].output.dense
    assert isinstance(layer, VariationalLayer)
    assert layer.std == "per_channel"
    assert layer.weight_log_std.requires_grad
    assert layer.weight_log_std.dtype == torch.float32
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded.train()(TOKENS, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert (layer.weight[~layer.weight_mask] == 0).all()
    assert not torch.equal(layer.weight, model.bert.encoder.layer[1].output.dense.weight)


def test_without_changes_the_quantizer_stays_out(tmp_path):
    bp.save(bert(), tmp_path)
    assert getattr(CLASSIFIER.from_pretrained(tmp_path), "hf_quantizer", None) is None


def vit() -> nn.Module:
    """transformers renames its modules on the way to the disk and back."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))
    return model.eval()


def vit_mlp(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear) and 24 in m.weight.shape][:2]


@pytest.mark.parametrize("kind", ["cut", "masked"])
def test_modules_that_are_renamed_on_disk(tmp_path, kind):
    model, images = vit(), torch.randn(2, 3, 16, 16)
    vit().save_pretrained(tmp_path / "stock")
    assert load_file(tmp_path / "stock" / "model.safetensors").keys() != model.state_dict().keys()
    if kind == "cut":
        cut_between(*vit_mlp(model), removed=2)
    else:
        masked(model)
    with torch.no_grad():
        expected = model(images).logits
        bp.save(model, tmp_path / "first")
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "first")
        assert torch.equal(loaded(images).logits, expected)
        loaded.save_pretrained(tmp_path / "second")
        again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "second")
        assert torch.equal(again(images).logits, expected)
        assert same_state(again, model)


def wav2vec2() -> nn.Module:
    """Its embedding of masked frames is a parameter of the model itself."""
    config = FAMILIES["Wav2Vec2"].config | {"mask_time_prob": 0.05}
    return build(replace(FAMILIES["Wav2Vec2"], config=config))


def xlnet() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
    return transformers.XLNetModel(transformers.XLNetConfig(**sizes)).eval()


def diff_llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**GROUPED)).eval()


@pytest.mark.parametrize(
    ("build_model", "first", "second"),
    [
        (wav2vec2, "feed_forward.intermediate_dense", "feed_forward.output_dense"),
        (xlnet, "ff.layer_1", "ff.layer_2"),
        (diff_llama, None, None),
    ],
)
def test_tensors_that_are_made_on_the_cpu_whatever_the_device(tmp_path, build_model, first, second):
    """transformers builds on the meta device, but a few models hold what `torch.Tensor(size)` made."""
    model = build_model()
    if first is None:
        masked(model)
    else:
        modules = dict(model.named_modules())
        name = next(name for name in modules if name.endswith(first))
        cut_between(modules[name], modules[name.removesuffix(first) + second])
    bp.save(model, tmp_path)
    assert same_state(type(model).from_pretrained(tmp_path), model)


def test_save_pretrained_writes_the_model_as_it_is(tmp_path):
    bp.save(cut(bert()), tmp_path / "0")
    model = CLASSIFIER.from_pretrained(tmp_path / "0")
    masked(cut(model))
    model.save_pretrained(tmp_path / "1")
    again = CLASSIFIER.from_pretrained(tmp_path / "1")
    assert torch.equal(outputs(again), outputs(model))
    assert again.bert.encoder.layer[1].intermediate.dense.out_features == 58
    bp.to_deterministic(again)
    again.config.intermediate_size = 58
    cut(again, removed=6, layer=0)
    again.save_pretrained(tmp_path / "2")
    assert "quantization_config" not in config(tmp_path / "2")


def test_buffers_outside_the_state_dict_come_back_with_other_values(tmp_path):
    model = cut(bert())
    model.bert.embeddings.token_type_ids = torch.ones_like(model.bert.embeddings.token_type_ids)
    expected = outputs(model)
    assert not torch.equal(outputs(cut(bert())), expected)
    bp.save(model, tmp_path)
    for loaded in (bp.load(tmp_path), CLASSIFIER.from_pretrained(tmp_path)):
        assert torch.equal(outputs(loaded), expected)
        assert same_state(loaded, model)


def test_tied_layers_have_tied_stds(tmp_path):
    """As in a model whose two layers were made one."""
    model = bert()
    first, second = (layer.output.dense for layer in model.bert.encoder.layer)
    second.weight = first.weight
    bp.to_variational(model)
    bp.save(model, tmp_path / "0")
    loaded = CLASSIFIER.from_pretrained(tmp_path / "0")
    loaded.save_pretrained(tmp_path / "1")
    for found in (loaded, bp.load(tmp_path / "0"), CLASSIFIER.from_pretrained(tmp_path / "1")):
        first, second = (layer.output.dense for layer in found.bert.encoder.layer)
        for name in ("weight", "weight_log_std"):
            assert getattr(first, name) is getattr(second, name), name
        assert first.bias is not second.bias
        assert same_state(found, model)


def test_a_converted_model_follows_its_own_saves(tmp_path):
    model = follow_saves(masked(bert()))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert same_state(CLASSIFIER.from_pretrained(tmp_path), model)


def test_trained_by_the_trainer_and_reloaded(tmp_path):
    bp.save(masked(cut(bert())), tmp_path / "start")
    model = CLASSIFIER.from_pretrained(tmp_path / "start")
    rows = [{"input_ids": TOKENS[i % 2].tolist(), "labels": i % 2} for i in range(8)]
    options = {"max_steps": 2, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(tmp_path / "run", per_device_train_batch_size=4, **options)
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    reloaded = CLASSIFIER.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert same_state(reloaded, model)
    assert torch.equal(outputs(reloaded), outputs(model))


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), (torch.float32, torch.float32)])
def test_stds_keep_their_dtype(tmp_path, dtype, expected):
    model = masked(bert().bfloat16())
    bp.save(model, tmp_path)
    loaded = CLASSIFIER.from_pretrained(tmp_path, dtype=dtype)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("log_std") else expected), name
    assert loaded.half().dtype == torch.float16
    if dtype == "auto":
        assert torch.equal(outputs(CLASSIFIER.from_pretrained(tmp_path)), outputs(model))


def test_another_head_takes_the_base(tmp_path):
    model = masked(cut(bert("BertModel")))
    bp.save(model, tmp_path / "base")
    classifier = CLASSIFIER.from_pretrained(tmp_path / "base", num_labels=5)
    assert torch.equal(outputs(classifier.bert), outputs(model))
    assert outputs(classifier).shape == (2, 5)
    assert {name for name, _ in variational_layers(classifier)} == {f"bert.{n}" for n, _ in variational_layers(model)}
    classifier.save_pretrained(tmp_path / "classifier")
    assert torch.equal(outputs(CLASSIFIER.from_pretrained(tmp_path / "classifier")), outputs(classifier))
    base = transformers.AutoModel.from_pretrained(tmp_path / "classifier")
    assert torch.equal(outputs(base), outputs(model))


@pytest.mark.parametrize("number", [np.float32(0.5), torch.tensor(0.25)])
def test_numbers_of_numpy_and_torch_come_back(tmp_path, number):
    model = cut(bert())
    for layer in model.bert.encoder.layer:
        layer.attention.self.scaling = number
    bp.save(model, tmp_path)
    for loaded in (bp.load(tmp_path), CLASSIFIER.from_pretrained(tmp_path)):
        assert type(loaded.bert.encoder.layer[0].attention.self.scaling) is type(number)
        assert torch.equal(outputs(loaded), outputs(model))


def test_other_code_is_refused(tmp_path):
    model = bert()
    model.bert.encoder.layer[0].__class__ = type("Mine", (type(model.bert.encoder.layer[0]),), {})
    with pytest.raises(StorageError, match=r"bert\.encoder\.layer\.0: .*Mine in the model"):
        bp.save(model, tmp_path)
    with pytest.raises(StorageError, match=r"bert\.encoder\.layer\.0: .*Mine in the model"):
        follow_saves(cut(model)).save_pretrained(tmp_path)


def test_generation_goes_on(tmp_path):
    model = masked(gpt2())
    model.generation_config.max_length = 13
    bp.save(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([[5, 6, 7]])
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    assert torch.equal(loaded.generate(prompt, **options), model.generate(prompt, **options))
    assert loaded.generation_config.max_length == 13


def damaged(directory: Path, kind: str) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    if kind == "another save":
        bp.save(cut(bert()), directory / "other")
        path.write_bytes((directory / "other" / "model.safetensors").read_bytes())
    elif kind == "lost tensor":
        del tensors["bert.pooler.dense.bias"]
        save_file(
            tensors, path, metadata={"format": "pt", "save_id": config(directory)["quantization_config"]["save_id"]}
        )
    elif kind == "no changes":
        rewrite(directory / "config.json", lambda c: c["quantization_config"].pop("changed"))
    elif kind == "other version":
        rewrite(directory / "config.json", lambda c: c["quantization_config"].update(format_version=99))
    elif kind == "other shape":
        name = "bert.encoder.layer.1.intermediate.dense.bias"
        rewrite(directory / "config.json", lambda c: c["quantization_config"]["changed"]["shapes"].update({name: [60]}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("another save", "come from two saves"),
        ("lost tensor", r"missing tensors \(1\)"),
        ("no changes", "holds no object 'shapes'"),
        ("other version", "format_version 99"),
        ("other shape", r"other shapes \(1\)"),
    ],
)
def test_damaged_directories_are_refused(tmp_path, kind, message):
    bp.save(cut(bert()), tmp_path)
    damaged(tmp_path, kind)
    with pytest.raises(StorageError, match=message):
        CLASSIFIER.from_pretrained(tmp_path)


def test_models_quantized_by_others_are_refused():
    model = bert()
    other = type("Other", (transformers.quantizers.HfQuantizer,), {"is_serializable": None, "is_trainable": None})
    model.hf_quantizer = other(transformers.BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(UnsupportedModelError, match="quantized with"):
        follow_saves(model)
