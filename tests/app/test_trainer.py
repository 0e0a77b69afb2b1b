"""`bayesprune compress --model hf:...` end to end on tiny models, and what it says to input that does not fit."""

import json

import pytest
import torch

pytest.importorskip("matplotlib")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    default_data_collator,
)

from bayesprune.app.pretrained import class_order, longest_input
from bayesprune.app.tasks.task import LoggedProgress, Training
from bayesprune.app.tasks.trainer import TrainingData, train
from tests.commands import run
from tests.hosts.transformers.tiny import VOCABULARY, bert, llama

WORDS = [f"w{number}" for number in range(VOCABULARY - 3)]
FAST = ["--epochs", "1", "--batch-size", "16", "--lr", "1e-3", "--train-lr", "1e-2"]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[END]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]", model_max_length=64
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models by kind, with tokenizers, and data for them."""
    root = tmp_path_factory.mktemp("hf")
    for name, model in (("bert", bert().bert), ("llama", llama())):
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, len(WORDS), (64, 6), generator=generator).tolist()
    labels = ["good" if row[0] % 2 else "bad" for row in rows]
    texts = [" ".join(WORDS[number] for number in row) for row in rows]
    lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in zip(texts, labels, strict=True))]
    (root / "labelled.tsv").write_text("\n".join(lines))
    (root / "plain.txt").write_text("\n".join(texts))
    (root / "short.txt").write_text("\n".join(texts[:4]))
    return root


def named(config, *names):
    config.id2label, config.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}
    return config


def compress(capsys, folders, model, out, *options):
    code, text, errors = run(capsys, "compress", "--model", f"hf:{folders / model}", "--out", str(out), *FAST, *options)
    assert code == 0, errors
    return text, json.loads((out / "report.json").read_text())


def test_text_classification_with_a_new_head(folders, tmp_path, capsys):
    data = ["--task", "text-classification", "--data", str(folders / "labelled.tsv")]
    text, report = compress(
        capsys, folders, "bert", tmp_path, *data, "--target", "macs=0.7", "--bits", "3", "--seed", "1"
    )
    assert "the model is trained first: its classes are LABEL_0, LABEL_1, LABEL_2, those of the data bad, good" in text
    assert "epoch 1/1: loss" in text
    assert "[4/5] Round the weights to 3 bits" in text
    assert text.index("[4/5]") < text.rindex("epoch 1/1: loss") < text.index("[5/5]")
    assert [row[0] for row in report["tables"][0]["rows"]] == ["fine-tuned", "3 bits", "3 bits, trained on"]
    assert report["after"]["macs"] <= 0.7 * report["before"]["macs"]
    assert report["metric"] == {"name": "accuracy", "is_lower_better": False}
    load = text[text.index("load the model: ") :].removeprefix("load the model: ").splitlines()[0]
    assert load.startswith("import bayesprune; from transformers import AutoModelForSequenceClassification; model = ")
    exec(load, named := {})
    assert named["model"].config.id2label == {0: "bad", 1: "good"}
    assert all(len(p.unique()) <= 7 for name, p in named["model"].named_parameters() if "query" in name)
    inputs = AutoTokenizer.from_pretrained(tmp_path)("w1 w2 w3", return_tensors="pt")
    assert named["model"](**inputs).logits.shape == (1, 2)


def test_a_classifier_of_the_same_classes_is_not_trained_first(folders, tmp_path, capsys):
    model = BertForSequenceClassification(named(bert().config, "GOOD", "BAD"))
    model.save_pretrained(tmp_path / "trained")
    tokenizer().save_pretrained(tmp_path / "trained")
    data = ["--task", "text-classification", "--data", str(folders / "labelled.tsv")]
    options = ["--uniform", "--granularity", "mlp", "--target", "params=0.9"]
    out = tmp_path / "out"
    text, _ = compress(capsys, tmp_path, "trained", out, *data, *options)
    assert "[1/4] Use the trained model" in text
    assert "[2/4] Remove neurons" in text
    assert "load the model: from transformers import AutoModelForSequenceClassification" in text
    assert "quantization_config" not in (out / "config.json").read_text()
    loaded = AutoModelForSequenceClassification.from_pretrained(out)
    assert (loaded.config.id2label, loaded.config.intermediate_size < 24) == ({0: "GOOD", 1: "BAD"}, True)


def test_causal_lm_keeps_a_fraction_of_the_weights(folders, tmp_path, capsys):
    data = ["--task", "causal-lm", "--data", str(folders / "plain.txt"), "--max-length", "8"]
    text, report = compress(capsys, folders, "llama", tmp_path, *data, "--target", "weights=0.25", "--batch-size", "4")
    assert "[3/5] Remove single weights" in text
    assert "40 train, 4 validation, 4 test blocks of 8 tokens" in text
    assert report["metric"]["name"] == "perplexity"
    assert 1 < report["before"]["accuracy"] < 10 * VOCABULARY
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    layers = [module.weight for name, module in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    assert sum(int(weight.count_nonzero()) for weight in layers) == round(0.25 * sum(map(torch.numel, layers)))
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False).shape == (1, 4)
    assert AutoTokenizer.from_pretrained(tmp_path)("w0 w1")["input_ids"] == [3, 4]


def test_image_classification_with_an_image_processor(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("timm")
    for split, count in (("train", 8), ("test", 2)):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                colour = (120 * label + number, 10, 10)
                image.new("RGB", (20, 20), colour).save(tmp_path / "data" / split / name / f"{number}.png")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    data = ["--task", "image-classification", "--data", str(tmp_path / "data")]
    text, report = compress(capsys, tmp_path, "vit", tmp_path / "out", *data, "--target", "macs=0.8")
    assert "14 training, 2 validation, 4 test images of 3x16x16, 2 classes" in text
    assert report["after"]["macs"] <= 0.8 * report["before"]["macs"]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "dark", 1: "light"}
    assert ViTImageProcessor.from_pretrained(tmp_path / "out").size == {"height": 16, "width": 16}


@pytest.mark.usefixtures("plain_accelerate")
def test_mixed_precision_is_for_the_training_alone(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    model, tokens = bert(), torch.tensor([[1, 2, 3]])
    examples = [{"input_ids": tokens[0], "labels": number % 2} for number in range(2)]
    dtypes = []
    model.classifier.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    for _ in range(2):
        train(model, TrainingData(examples, default_data_collator, 2, 0), LoggedProgress(), Training(1, 1e-3))
        model(tokens)
    assert dtypes == 2 * [torch.bfloat16, torch.float32]
    assert not {"forward", "_original_forward"} & vars(model).keys()


LLAMA = "llama --task causal-lm --data {root}/plain.txt"
BERT = "bert --task text-classification --data {root}/labelled.tsv"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("bert --data {root}/labelled.tsv", "expected one of text-classification"),
        ("bert --task text-classification", "needs data"),
        (LLAMA.replace("llama", "none"), "there is no folder"),
        (LLAMA.replace("llama", "empty"), "no weights"),
        (LLAMA.replace("llama", ""), "no config.json"),
        (LLAMA.replace("llama", "mute"), "no tokenizer"),
        (LLAMA.replace("plain", "none"), "no file or folder"),
        (BERT.replace("bert", "vit"), "ViTConfig"),
        (f"{LLAMA} --max-length 100", "--max-length is 100; expected 2 to 64"),
        (LLAMA.replace("plain.txt", "short.txt --max-length 10"), "too short"),
        (f"{LLAMA} --pretrained", "for timm"),
        (f"{LLAMA} --augment", "for images"),
        (f"{LLAMA} --label-column label", "has no labels"),
        (f"{LLAMA} --out {{root}}/llama", "starts from"),
        (f"{LLAMA} --device cuda:1", "cuda:1"),
        (f"{LLAMA} --max-length 8 --target macs=0.01", "cannot be reached"),
        (f"{LLAMA} --device abacus", "cannot be used here"),
        (f"{BERT} --uniform", "cannot say the sizes"),
    ],
)
def test_wrong_input_is_told_before_any_training(arguments, said, folders, tmp_path, capsys):
    for name in ("empty", "mute", "vit"):
        (folders / name).mkdir(exist_ok=True)
    (folders / "empty" / "config.json").write_text((folders / "llama" / "config.json").read_text())
    for name in ("config.json", "model.safetensors"):
        (folders / "mute" / name).write_bytes((folders / "llama" / name).read_bytes())
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(folders / "vit")
    tokenizer().save_pretrained(folders / "vit")
    model, *options = f"hf:{{root}}/{arguments}".format(root=folders).split()
    code, out, err = run(capsys, "compress", "--out", str(tmp_path / "out"), "--model", model, *options)
    assert code != 0
    assert said in " ".join((out + err).replace("│", " ").split())
    assert "epoch" not in out


def test_several_processes_are_told_before_any_training(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = LLAMA.format(root=folders).split()[1:]
    code, _, err = run(capsys, "compress", "--out", str(tmp_path), "--model", f"hf:{folders / 'llama'}", *options)
    assert code != 0
    assert "launched in several processes, and trains in one" in " ".join(err.replace("│", " ").split())


def test_classes_are_matched_by_name_then_by_number():
    def order(names, *wanted, are_numbered=False):
        return class_order(named(bert().config, *names), wanted, are_numbered=are_numbered)

    assert order(["POSITIVE", "NEGATIVE"], "negative", "positive") == [1, 0]
    assert order(["cat", "dog"], "0", "1", are_numbered=True) == [0, 1]
    assert order(["LABEL_0", "LABEL_1"], "negative", "positive", are_numbered=True) == [0, 1]
    assert order(["LABEL_0", "LABEL_1"], "negative", "positive") is None
    assert order(["cat", "dog", "owl"], "0", "1", are_numbered=True) is None
    assert order(["cat", "dog"], "cat", "owl") is None


def test_the_longest_input_is_what_tokenizer_and_positions_allow():
    config = llama(max_position_embeddings=48).config
    assert longest_input(config, tokenizer(), None, default=32) == 32
    assert longest_input(config, tokenizer(), None, default=128) == 48
    with pytest.raises(ValueError, match="2 to 48"):
        longest_input(config, tokenizer(), 64, default=128)
