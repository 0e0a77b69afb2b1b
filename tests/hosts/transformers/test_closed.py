"""A saved model of transformers reads its own directory and nothing else, whatever its config says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import bayesprune as bp
from bayesprune.errors import StorageError

transformers = pytest.importorskip("transformers")
pytest.importorskip("bayesprune.hosts.transformers")

from bayesprune.hosts.transformers.closed import check_config, closed, for_building  # noqa: E402
from bayesprune.storage.spec import plain_attributes  # noqa: E402
from tests.hosts.transformers.saved import bert, config, cut, outputs  # noqa: E402
from tests.storage.sealing import rewrite  # noqa: E402
from tests.storage.watching import watching  # noqa: E402

CODE = {"AutoModel": "modeling.Evil"}
UNMAPPED = {"model_type": "blip_text_model", "hidden_size": 16}  # AutoModel has no class of its own for it
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory whose model is built by an Auto class from configs inside its config."""
    folder = tmp_path_factory.mktemp("llava")
    text = transformers.LlamaConfig(**SIZES, vocab_size=32)
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)
    )
    bp.save(model, folder)
    (folder / "modeling.py").write_text("import os\nos.system('true')\nclass Evil: pass\n")
    return folder


@pytest.fixture
def llava(saved, tmp_path):
    (tmp_path / "outside.pth").write_bytes(b"")
    return Path(shutil.copytree(saved, tmp_path / "saved"))


def leads(directory):
    """What is put into the config of the text model, by what it leads to."""
    outside = str(directory.parent / "outside.pth")
    hidden = {"attribute_map": {"x": "auto_map", "y": "_name_or_path"}, "x": CODE, "y": str(directory)}
    timm = {"model_type": "timm_wrapper", "architecture": "test_resnet"}
    return {
        "code": UNMAPPED | {"auto_map": CODE, "name_or_path": str(directory)},
        "code by another name": UNMAPPED | hidden,
        "code hidden from a look": UNMAPPED | hidden | {"attribute_map": {"__dict__": "z", "x": "auto_map"}, "z": {}},
        "a kernel": {"attn_implementation": "someone/kernel"},
        "a kernel by another name": {"attribute_map": {"x": "_attn_implementation_internal"}, "x": "someone/kernel"},
        "kernels for experts": {"_experts_implementation": "someone/kernel"},
        "weights of timm": timm | {"model_args": {"checkpoint_path": outside}},
        "another directory": timm | {"architecture": f"local-dir:{directory.parent}"},
        "a saved model": timm | {"architecture": "bayesprune_pruned"},
        "the hub": {"model_type": "detr", "backbone": "someone/net", "backbone_config": None},
        "the hub through timm": {"model_type": "timm_backbone", "backbone": "hf-hub:someone/net"},
    }


@pytest.mark.parametrize("kind", leads(Path()))
def test_load_reads_asks_and_runs_nothing_else(llava, monkeypatch, kind):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    lead = leads(llava)[kind]
    rewrite(llava / "bayesprune.json", lambda record: record["base"]["args"]["config"]["text_config"].update(lead))
    with watching(llava) as events:
        try:
            model = bp.load(llava)
        except StorageError:
            model = None
    assert events == []
    assert model is None or not any(hasattr(part, "auto_map") for part in (model.config, model.config.text_config))


def test_module_takes_no_name_of_a_file():
    """wav2vec2 reads an adapter of this name when its weights are tied, after a load."""
    module = torch.nn.Identity()
    module.target_lang, module.size = "../outside", 3
    assert plain_attributes(module) == {"size": 3}


def test_names_in_lists_are_left_out_too():
    words = {"label2id": {"auto_map": 0}, "id2label": {"0": "auto_map"}, "vocabulary_map": {"name_or_path": 3}}
    inside = [{"auto_map": CODE, "size": 1}, [{"attn_implementation": "x/y"}]]
    assert for_building(words | {"parts": inside}) == words | {"parts": [{"size": 1}, [{}]]}


def test_labels_may_be_called_anything(tmp_path):
    names = {0: "auto_map", 1: "[bold]", 2: "quantization_config"}
    model = bert(id2label=names, label2id={name: number for number, name in names.items()})
    bp.save(cut(model), tmp_path)
    for loaded in (bp.load(tmp_path), type(model).from_pretrained(tmp_path)):
        assert loaded.config.id2label == names
        assert loaded.config.label2id == model.config.label2id


@pytest.mark.parametrize(
    "lead",
    [
        {"attn_implementation": "someone/kernel"},
        {"attribute_map": {"x": "_attn_implementation_internal"}, "x": "someone/kernel"},
        {"auto_map": CODE},
        {"parts": [{"transformers_weights": "../other.safetensors"}]},
    ],
)
@pytest.mark.parametrize("auto", [True, False])
def test_from_pretrained_refuses_what_leads_out(tmp_path, lead, auto):
    bp.save(cut(bert()), tmp_path)
    rewrite(tmp_path / "config.json", lambda config: config.update(lead))
    kind = transformers.AutoModelForSequenceClassification if auto else transformers.BertForSequenceClassification
    with pytest.raises(StorageError, match="lead out of it|would have transformers read or run"):
        kind.from_pretrained(tmp_path)


def test_what_the_caller_asks_for_is_not_refused(tmp_path):
    model = cut(bert())
    bp.save(model, tmp_path)
    for name in ("eager", "sdpa"):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.config._attn_implementation == name
        assert torch.allclose(outputs(loaded), outputs(model), atol=1e-6)


def test_config_that_once_named_code_is_saved_without_it(tmp_path):
    """As models of the Hub do that transformers has its own class for by now."""
    model = cut(bert())
    model.config.auto_map = {"AutoModel": "someone/net--modeling.Net"}
    bp.save(model, tmp_path / "ours")
    loaded = bp.load(tmp_path / "ours")
    loaded.config.auto_map = model.config.auto_map
    loaded.save_pretrained(tmp_path / "theirs")
    assert "auto_map" not in config(tmp_path / "theirs")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "theirs")), outputs(model))


def test_honest_configs_of_all_kinds_pass():
    """Configs inside configs, rope parameters, lists of layer types, attributes of one's own."""
    llama = transformers.LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10**9})
    llama.note = {"by": ["me", 1, None]}
    kinds = (llama, transformers.LlavaConfig(), transformers.T5Config(), transformers.Gemma3Config())
    kinds += (transformers.Qwen3NextConfig(), transformers.DetrConfig(), transformers.TimmWrapperConfig())
    kinds += (transformers.Wav2Vec2Config(), transformers.SwinConfig(out_features=["stage1"]))
    for kind in kinds:
        again = type(kind).from_dict(for_building(json.loads(kind.to_json_string())))
        check_config(again)
        assert again.to_dict() == kind.to_dict()


def test_closed_opens_again(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with closed():
        assert constants.is_offline_mode()
    with pytest.raises(ZeroDivisionError), closed():
        raise ZeroDivisionError
    assert not constants.is_offline_mode()
