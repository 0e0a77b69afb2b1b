"""Models of transformers are saved and loaded by name: `save` and `load`."""

import json
from typing import ClassVar

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.errors import StorageError

transformers = pytest.importorskip("transformers")
pytest.importorskip("bayesprune.hosts.transformers")

from tests.hosts.transformers.families import FAMILIES, build  # noqa: E402
from tests.hosts.transformers.families import TOKENS as TOKENS_OF_A_DECODER  # noqa: E402
from tests.hosts.transformers.saved import TOKENS, bert, config, cut, gpt2, masked, outputs, same_state  # noqa: E402
from tests.storage.sealing import rewrite  # noqa: E402

MODELS = {
    "dense": bert,
    "cut": lambda: cut(bert()),
    "masked": lambda: masked(bert("BertForMaskedLM"), std="rank_one"),
    "cut and masked": lambda: masked(cut(bert("BertModel"))),
    "variational GPT-2": lambda: masked(gpt2(), std="per_channel"),
    "half precision": lambda: masked(cut(bert()).bfloat16()),
}


@pytest.mark.parametrize("kind", MODELS)
def test_saved_model_comes_back(tmp_path, kind):
    model = MODELS[kind]()
    expected = outputs(model)
    random_numbers = torch.get_rng_state()
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(outputs(loaded), expected)
    assert same_state(loaded, model)
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["ALBERT", "T5", "Llama", "Swin", "CLIP", "Wav2Vec2"])
def test_buffers_and_ties_are_those_of_the_family(tmp_path, family):
    """Shared layers, tied embeddings, rotary frequencies, index tables, two towers, weight norm."""
    model, inputs = build(FAMILIES[family]), FAMILIES[family].inputs()
    with torch.no_grad():
        expected = model(**inputs).loss
        bp.save(model, tmp_path)
        assert torch.equal(bp.load(tmp_path)(**inputs).loss, expected)


def test_config_generation_config_and_checkpointing_are_kept(tmp_path):
    model = gpt2()
    model.generation_config.max_length = 13
    model.generation_config.do_sample = False
    model.config.n_positions = 32  # whatever the config says at the time
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    bp.save(model, tmp_path)
    assert "generation_config.json" in {path.name for path in tmp_path.iterdir()}
    loaded = bp.load(tmp_path)
    assert loaded.generation_config.max_length == 13
    assert loaded.config.to_dict().keys() >= model.config.to_dict().keys()
    assert loaded.transformer.gradient_checkpointing
    prompt = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(prompt)
    assert torch.equal(
        loaded.generate(prompt, attention_mask=mask), model.generate(prompt, attention_mask=mask, do_sample=False)
    )


def test_class_head_and_labels_come_from_the_config(tmp_path):
    labels = {0: "bad", 1: "fair", 2: "good"}
    bp.save(bert("BertForTokenClassification", id2label=labels), tmp_path)
    loaded = bp.load(tmp_path)
    assert type(loaded).__name__ == "BertForTokenClassification"
    assert loaded.config.id2label == labels


def test_labels_may_have_any_name(tmp_path):
    """Also those of keys of the config that are left out of what is saved."""
    names = ["auto_map", "attn_implementation", "name_or_path"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    bp.save(cut(bert(**labels)), tmp_path)
    for loaded in (bp.load(tmp_path), transformers.BertForSequenceClassification.from_pretrained(tmp_path)):
        assert loaded.config.label2id == labels["label2id"]
        assert loaded.config.id2label == labels["id2label"]


def mamba2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "n_groups": 1}
    config = transformers.Mamba2Config(**sizes, num_heads=4, head_dim=8, chunk_size=8, **TOKENS_OF_A_DECODER)
    return transformers.Mamba2ForCausalLM(config).eval()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_json_lacks(tmp_path, value):
    """transformers writes texts for them, which only its reader of files turns back."""
    model = masked(bert())
    model.config.floor = value
    bp.save(model, tmp_path)
    for loaded in (bp.load(tmp_path), transformers.BertForSequenceClassification.from_pretrained(tmp_path)):
        assert repr(loaded.config.floor) == repr(value)


def test_time_steps_without_a_limit(tmp_path):
    model = masked(mamba2())
    assert model.config.time_step_limit[1] == float("inf")
    bp.save(model, tmp_path)
    for loaded in (bp.load(tmp_path), transformers.Mamba2ForCausalLM.from_pretrained(tmp_path)):
        assert same_state(loaded, model)
        assert tuple(loaded.config.time_step_limit) == tuple(model.config.time_step_limit)


def test_dense_model_is_an_ordinary_directory(tmp_path):
    """With zeros and all: nothing but transformers is needed to load it."""
    model = bp.to_deterministic(masked(bert()))
    bp.save(model, tmp_path / "ours")
    assert "quantization_config" not in config(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / name)
        assert torch.equal(outputs(loaded), outputs(model))
    assert (model.bert.encoder.layer[0].output.dense.weight == 0).any()


def test_width_that_the_config_says_needs_nothing_else(tmp_path):
    model = bert()
    for layer in (0, 1):
        dense = model.bert.encoder.layer[layer]
        dense.intermediate.dense.weight = nn.Parameter(dense.intermediate.dense.weight[:40])
        dense.intermediate.dense.bias = nn.Parameter(dense.intermediate.dense.bias[:40])
        dense.output.dense.weight = nn.Parameter(dense.output.dense.weight[:, :40])
        dense.intermediate.dense.out_features = dense.output.dense.in_features = 40
    bp.save(model, tmp_path / "layers")
    assert "quantization_config" in config(tmp_path / "layers")
    model.config.intermediate_size = 40
    bp.save(model, tmp_path / "uniform")
    assert "quantization_config" not in config(tmp_path / "uniform")
    assert torch.equal(outputs(bp.load(tmp_path / "uniform")), outputs(model))


def test_where_a_model_came_from_is_not_told(tmp_path):
    bert().save_pretrained(tmp_path / "secret_place")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "secret_place")
    bp.save(model, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.json"):
        assert "secret_place" not in path.read_text()


class Scaled(transformers.BertModel):
    """A class of one's own, whose forward is another."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output


class TwoTowersConfig(transformers.PreTrainedConfig):
    model_type = "two_towers"
    sub_configs: ClassVar = {"left": transformers.BertConfig}
    left: dict | transformers.BertConfig | None = None
    width: int = 8

    def __post_init__(self, **kwargs):
        if not isinstance(self.left, transformers.BertConfig):
            self.left = transformers.BertConfig(**(self.left or {}))
        super().__post_init__(**kwargs)


class TwoTowers(transformers.PreTrainedModel):
    """A model and a config of one's own, around a model of transformers."""

    config_class = TwoTowersConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config.left)
        self.head = nn.Linear(config.left.hidden_size, config.width)
        self.post_init()

    def forward(self, input_ids):
        return transformers.modeling_outputs.BaseModelOutput(self.head(self.bert(input_ids).last_hidden_state))


class BertForMaskedLM(transformers.BertForMaskedLM):
    """Named as the class that it is derived from."""


def own_model(kind: type) -> nn.Module:
    dense = bert("BertModel").config
    torch.manual_seed(0)
    return kind(TwoTowersConfig(left=dense, width=5) if kind is TwoTowers else dense).eval()


@pytest.mark.parametrize("kind", [Scaled, TwoTowers, BertForMaskedLM])
def test_class_of_ones_own_comes_back(tmp_path, kind):
    model = cut(own_model(kind))
    bp.save(model, tmp_path / "0", example_inputs=(TOKENS,))
    kind.from_pretrained(tmp_path / "0").save_pretrained(tmp_path / "1")
    loaded = [bp.load(tmp_path / "0"), bp.load(tmp_path / "0", model=own_model(kind))]
    for found in (*loaded, *(kind.from_pretrained(tmp_path / number) for number in ("0", "1"))):
        assert type(found) is kind
        assert torch.equal(outputs(found), outputs(model))


def test_class_of_ones_own_that_is_not_there(tmp_path):
    bp.save(own_model(Scaled), tmp_path)
    rewrite(tmp_path / "bayesprune.json", lambda record: record["base"].update(name="Vanished"))
    with pytest.raises(StorageError, match=r"no model class 'Vanished'\. It is a class of your own: import the module"):
        bp.load(tmp_path)
    assert torch.equal(outputs(bp.load(tmp_path, model=own_model(Scaled))), outputs(own_model(Scaled)))


class WithArguments(transformers.BertModel):
    def __init__(self, config, width):
        super().__init__(config)
        self.extra = nn.Linear(16, width)


def test_class_of_ones_own_that_a_config_does_not_build(tmp_path):
    model = WithArguments(bert("BertModel").config, 3)
    with pytest.raises(StorageError, match=r"plain=True"):
        bp.save(model, tmp_path)
    bp.save(model, tmp_path, plain=True)
    again = bp.load(tmp_path, model=WithArguments(bert("BertModel").config, 3))
    assert same_state(again, model)


def test_arguments_beside_the_config_are_refused(tmp_path):
    with pytest.raises(ValueError, match="whose config says how it is built"):
        bp.save(bert(), tmp_path, model_args={"num_labels": 3})


def test_other_layers_than_the_config_says_are_refused(tmp_path):
    model = bert()
    model.classifier = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(StorageError, match="does not become the model to save"):
        bp.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["BertForSinging", "AutoModel", "pipeline", "os.path"])
def test_names_that_are_no_model_classes(tmp_path, name):
    bp.save(bert(), tmp_path)
    rewrite(tmp_path / "bayesprune.json", lambda record: record["base"].update(name=name))
    with pytest.raises(StorageError, match="has no model class"):
        bp.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda args: args.pop("config"), "holds no config"),
        (lambda args: args["config"].update(hidden_size=15), "does not build BertForSequenceClassification"),
        (lambda args: args["config"].update(num_hidden_layers=3), "cannot be loaded"),
    ],
)
def test_damaged_config(tmp_path, change, message):
    bp.save(bert(), tmp_path)
    rewrite(tmp_path / "bayesprune.json", lambda record: change(record["base"]["args"]))
    with pytest.raises(StorageError, match=message):
        bp.load(tmp_path)


def test_nothing_in_the_files_runs_code(tmp_path):
    """Remote code and kernels from elsewhere are left out of the config that the model is built from."""
    bp.save(bert(), tmp_path)
    asked = {"auto_map": {"AutoModel": "evil.Model"}, "attn_implementation": "someone/kernel"}
    rewrite(tmp_path / "bayesprune.json", lambda record: record["base"]["args"]["config"].update(asked))
    loaded = bp.load(tmp_path)
    assert not hasattr(loaded.config, "auto_map")
    assert loaded.config._attn_implementation in ("sdpa", "eager")
    assert json.loads((tmp_path / "bayesprune.json").read_text())["versions"]["transformers"]


@pytest.mark.parametrize("family", ["BigBird", "BigBirdPegasus"])
def test_a_model_that_took_other_blocks_by_itself_is_saved_with_them(tmp_path, family):
    sizes = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3}
    if family == "BigBird":
        sizes |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    else:
        sizes |= {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
        sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{family}Model")
    model = model_class(model_class.config_class(**sizes)).eval()
    tokens = torch.randint(4, 90, (2, 8))
    expected = model(tokens).last_hidden_state  # a short sequence: it attends in full from now on
    bp.save(model, tmp_path)
    for loaded in (bp.load(tmp_path), model_class.from_pretrained(tmp_path).eval()):
        assert torch.equal(loaded(tokens).last_hidden_state, expected)


class TwoHeads(transformers.BertPreTrainedModel):
    """Two layers that are one weight."""

    _tied_weights_keys: ClassVar = {"second.weight": "first.weight", "second.bias": "first.bias"}

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.first, self.second = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))
        self.post_init()

    def forward(self, input_ids):
        hidden = self.bert(input_ids).last_hidden_state
        return transformers.modeling_outputs.BaseModelOutput(self.second(torch.relu(self.first(hidden))))


def test_removed_weights_of_tied_layers_come_back_alike(tmp_path, monkeypatch):
    model = bp.to_variational(own_model(TwoHeads))
    bp.prune_weights(model, "weights=0.5")
    model.eval()
    assert model.first.weight is model.second.weight
    assert model.first.weight_mask is model.second.weight_mask
    bp.save(model, tmp_path)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)  # what memory may hold: a mask that removes everything
    for loaded in (bp.load(tmp_path), TwoHeads.from_pretrained(tmp_path)):
        assert same_state(loaded, model)
        assert loaded.first.weight_mask is loaded.second.weight_mask
