"""A cut model of transformers with a head of one's own: the trunk is the saved one, and the head fits it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.errors import StorageError

transformers = pytest.importorskip("transformers")
pytest.importorskip("bayesprune.hosts.transformers")

from tests.hosts.transformers.families import FAMILIES, build, example_inputs  # noqa: E402
from tests.hosts.transformers.saved import TOKENS, cut_between, outputs, rewrite  # noqa: E402

GRANULARITY = ("heads", "mlp", "width")


def trunk_output(model: nn.Module) -> torch.Tensor:
    return outputs(getattr(model, model.base_model_prefix, model))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> tuple[nn.Module, Path]:
    """A classifier whose every width was cut, also those that another head reads, variational."""
    model = bp.to_variational(build(FAMILIES["BERT"]))
    for share in (0.4, 0.2):
        bp.prune_channels(model, example_inputs("BERT"), target=f"macs={share}", granularity=GRANULARITY)
    assert model.bert.embeddings.word_embeddings.embedding_dim < 16
    assert model.classifier.in_features < model.bert.embeddings.word_embeddings.embedding_dim
    directory = tmp_path_factory.mktemp("narrow")
    bp.save(model.eval(), directory)
    return model, directory


@pytest.mark.parametrize(
    ("kind", "options", "shape"),
    [
        ("SequenceClassification", {"num_labels": 5}, (2, 5)),
        ("TokenClassification", {}, (2, 8, 2)),
        ("TokenClassification", {"id2label": {0: "a", 1: "b", 2: "c"}}, (2, 8, 3)),
        ("MaskedLM", {}, (2, 8, 64)),
        ("NextSentencePrediction", {}, (2, 2)),
    ],
)
def test_another_head(tmp_path, narrow, kind, options, shape):
    model, directory = narrow
    auto = getattr(transformers, f"AutoModelFor{kind}")
    other = auto.from_pretrained(directory, ignore_mismatched_sizes=True, **options)
    assert torch.equal(trunk_output(other), trunk_output(model))
    logits = outputs(other)
    assert logits.shape == shape
    assert logits.isfinite().all()
    other.save_pretrained(tmp_path)
    assert torch.equal(outputs(auto.from_pretrained(tmp_path)), logits)
    bp.save(other, tmp_path, example_inputs=(TOKENS,))
    assert torch.equal(outputs(bp.load(tmp_path)), logits)
    other.train()(TOKENS)["logits"].sum().backward()
    assert all(parameter.grad is not None for name, parameter in other.named_parameters() if "classifier" in name)


def test_layers_that_were_made_one_stay_one(tmp_path):
    model = build(FAMILIES["BERT"])
    first, second = (layer.output.dense for layer in model.bert.encoder.layer)
    second.weight = first.weight
    bp.save(model, tmp_path)
    other = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert other.bert.encoder.layer[0].output.dense.weight is other.bert.encoder.layer[1].output.dense.weight
    assert torch.equal(trunk_output(other), trunk_output(model))


def test_without_a_head(narrow):
    model, directory = narrow
    assert torch.equal(outputs(transformers.AutoModel.from_pretrained(directory)), trunk_output(model))


def test_another_vocabulary(narrow):
    model, directory = narrow
    other = transformers.BertForSequenceClassification.from_pretrained(
        directory, vocab_size=70, ignore_mismatched_sizes=True
    )
    width = model.bert.embeddings.word_embeddings.embedding_dim
    assert other.bert.embeddings.word_embeddings.weight.shape == (70, width)
    assert torch.equal(other.classifier.weight, model.classifier.weight)


def test_transformers_wants_to_be_told_of_other_sizes(narrow):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForSequenceClassification.from_pretrained(narrow[1], num_labels=5)


def test_a_changed_config_is_refused_before_a_model_is_built(narrow, tmp_path):
    bp.save(narrow[0], tmp_path)
    rewrite(tmp_path / "config.json", lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(StorageError, match="SHA-256"):
        transformers.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)


def test_decoder_that_is_no_part_of_another_class(tmp_path):
    """T5 holds its trunk under another prefix where it classifies."""
    model = build(FAMILIES["T5"])
    for block in (*model.encoder.block, *model.decoder.block):
        cut_between(block.layer[-1].DenseReluDense.wi, block.layer[-1].DenseReluDense.wo, 5)
    bp.save(model, tmp_path)
    other = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    assert torch.equal(outputs(other.transformer.encoder), outputs(model.encoder))
    assert outputs(other).shape == (2, 8, 5)


def test_images(tmp_path):
    model = build(FAMILIES["ConvNeXt"])
    bp.prune_channels(bp.to_variational(model), example_inputs("ConvNeXt"), target="macs=0.4")
    bp.save(bp.to_deterministic(model).bfloat16(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    other = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True
    )
    images = example_inputs("ConvNeXt")["pixel_values"].bfloat16()
    with torch.no_grad():
        assert other(images).logits.shape == (2, 7)
        found, expected = other.convnext(images).pooler_output, model.eval().convnext(images).pooler_output
    assert torch.equal(found, expected)
