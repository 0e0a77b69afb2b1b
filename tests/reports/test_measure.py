import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesprune import reports
from bayesprune.foundation import latency
from bayesprune.foundation.batches import given
from bayesprune.reports.measure import tensor_bytes, uncounted_layers


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7)
        self.head.weight = self.embedding.weight

    def forward(self, ids, scale=1.0):
        return scale * self.head(self.embedding(ids)).mean(1)


def add_companions(layer):
    layer.weight_log_std = nn.Parameter(torch.zeros_like(layer.weight))
    layer.register_buffer("weight_mask", torch.ones_like(layer.weight, dtype=torch.bool))


def training_flags(model):
    return [module.training for module in model.modules()]


def partly_frozen():
    """A model in training mode whose batch norm its user keeps frozen."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(2))
    model(torch.randn(2, 3, 6, 6))
    model.train()
    model[1].eval()
    return model


def test_parameters_are_counted_with_and_without_zeros():
    model = nn.Linear(3, 4)
    with torch.no_grad():
        model.weight[1] = 0
        model.bias[:] = 1
        model.weight[[0, 2, 3]] = 1
    assert reports.count_parameters(model) == (16, 13)


def test_shared_parameters_count_once_and_stds_never():
    model = Tied()
    assert reports.count_parameters(model).total == 7 * 5 + 7
    assert tensor_bytes(model) == 4 * (7 * 5 + 7)
    add_companions(model.head)
    assert reports.count_parameters(model).total == 7 * 5 + 7
    assert tensor_bytes(model) == 4 * (7 * 5 + 7)


def test_tensor_bytes_follow_the_dtype_and_hold_persistent_buffers_only():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.register_buffer("cache", torch.zeros(100), persistent=False)
    model.register_buffer("attention_mask", torch.zeros(6))  # a mask of no parameter: it is shipped
    assert tensor_bytes(model) == 4 * (16 + 4 * 4 + 6) + 8  # num_batches_tracked is one int64
    assert tensor_bytes(model.bfloat16()) == 2 * (16 + 4 * 4 + 6) + 8


def test_file_bytes_of_a_file_and_of_a_directory_without_reports(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "config.json").write_bytes(b"12")
    (tmp_path / "report.html").write_bytes(b"1" * 1000)
    assert reports.file_bytes(tmp_path / "model.safetensors") == 5
    assert reports.file_bytes(str(tmp_path)) == 7
    with pytest.raises(FileNotFoundError, match=r"missing.*save the model"):
        reports.file_bytes(tmp_path / "missing")


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(3, 4), (5, 3), 5 * 3 * 4),
        (nn.Linear(3, 4, bias=False), (2, 7, 3), 2 * 7 * 3 * 4),
        (nn.Conv1d(3, 4, 5), (2, 3, 9), 2 * 5 * 4 * 3 * 5),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 8, 8), 2 * 16 * 6 * 2 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 25 * 4 * 6 * 4),
    ],
)
def test_macs_of_a_layer_by_formula(layer, shape, macs):
    assert reports.count_macs(layer, torch.randn(shape)) == (macs, shape[0], "torch.utils.flop_counter, FLOPs / 2")


@pytest.mark.parametrize("is_fast", [True, False])
def test_macs_of_an_encoder_layer_hold_its_attention_and_the_fast_path_is_left_as_it_was(is_fast):
    batch, tokens, width, hidden = 2, 5, 8, 16
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True).eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(is_fast)
        by_module = reports.macs_by_module(layer, torch.randn(batch, tokens, width))
        assert torch.backends.mha.get_fastpath_enabled() == is_fast
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    attention = batch * (tokens * 4 * width * width + 2 * tokens * tokens * width)
    assert by_module["self_attn"] == attention
    assert by_module["linear1"] == by_module["linear2"] == batch * tokens * width * hidden
    assert sum(by_module.values()) == attention + 2 * batch * tokens * width * hidden
    assert uncounted_layers(layer, by_module) == []


def test_macs_of_a_module_that_runs_twice_and_of_one_that_never_runs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.lookup = nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(4, 3)

        def forward(self, x):
            return self.used(self.used(x)) @ torch.ones(3, 2)

    model = Twice()
    by_module = reports.macs_by_module(model, torch.randn(1, 3))
    assert by_module == {"": 6, "used": 18, "idle": 0, "lookup": 0}
    assert uncounted_layers(model, by_module) == ["idle"]


def test_layers_that_the_counter_does_not_know_are_named():
    model = nn.Sequential(nn.LSTM(3, 4))
    assert uncounted_layers(model, reports.macs_by_module(model, torch.randn(5, 1, 3))) == ["0"]


@pytest.mark.parametrize("inputs", [(torch.tensor([[1, 2]]), 2.0), {"scale": 2.0, "ids": torch.tensor([[1, 2]])}])
def test_inputs_are_positional_or_by_name(inputs):
    assert reports.count_macs(Tied(), inputs)[:2] == (2 * 5 * 7, 1)


def test_inputs_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="inputs are a str; expected a tensor"):
        reports.count_macs(Tied(), "ids")
    with pytest.raises(ValueError, match="no tensor with a batch dimension"):
        given(Tied(), (1.0, torch.tensor(3))).num_examples  # noqa: B018


@pytest.mark.parametrize(
    "run",
    [
        lambda model, x: reports.macs_by_module(model, x),
        lambda model, x: reports.latency(model, x, num_repeats=1),
        lambda model, x: reports.accuracy(model, [(x, torch.zeros(len(x), dtype=torch.long))]),
    ],
    ids=["macs", "latency", "accuracy"],
)
def test_a_model_is_left_as_it_was(run):
    model = partly_frozen()
    flags, state = training_flags(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    run(model, torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)))
    assert training_flags(model) == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_fails_is_left_as_it_was():
    model = partly_frozen()
    flags = training_flags(model)
    with pytest.raises(RuntimeError):
        reports.macs_by_module(model, torch.randn(2, 3, 60, 6))
    assert training_flags(model) == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Sleeper(nn.Module):
    def __init__(self, name, seconds, calls):
        super().__init__()
        self.name, self.seconds, self.calls = name, seconds, calls

    def forward(self, x):
        self.calls.append(self.name)
        time.sleep(self.seconds)
        return x


def test_latencies_are_taken_in_turns(monkeypatch):
    monkeypatch.setattr(latency, "SECONDS_PER_REPEAT", 0.05)
    calls = []
    slow, fast = reports.latencies(
        [Sleeper("a", 0.02, calls), Sleeper("b", 0.012, calls)], torch.zeros(3, 1), num_repeats=4
    )
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert turns == ["a", "b"] * 5  # one round that finds how many passes a repeat takes, then four
    assert slow.median_seconds >= 0.02
    assert fast.median_seconds >= 0.012


def test_latency_names_its_conditions():
    threads = torch.get_num_threads()
    measured = reports.latency(nn.Linear(3, 4).bfloat16(), torch.randn(6, 3).bfloat16(), num_repeats=3)
    assert measured.device.startswith("cpu (")
    assert measured.conditions[1:] == (threads, 6, "bfloat16")
    assert measured.num_repeats == 3
    assert 0 < measured.q25_seconds <= measured.median_seconds <= measured.q75_seconds
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="num_repeats is 0"):
        reports.latency(nn.Linear(3, 4), torch.randn(6, 3), num_repeats=0)


def test_dtype_is_that_of_the_means_not_of_the_stds():
    layer = nn.Linear(3, 4).bfloat16()
    layer._parameters = {"weight_log_std": nn.Parameter(torch.zeros(4, 3)), **layer._parameters}
    assert reports.latency(layer, torch.randn(6, 3).bfloat16(), num_repeats=1).dtype == "bfloat16"


def test_accuracy_is_the_fraction_of_top_1():
    batches = [(F.one_hot(torch.tensor([0, 1, 2]), 3).float(), torch.tensor([0, 1, 0]))]
    batches.append((F.one_hot(torch.tensor([2]), 3).float(), torch.tensor([0])))
    assert reports.accuracy(nn.Identity(), batches) == 0.5


def test_a_label_that_no_loss_counts_is_no_error():
    assert reports.accuracy(nn.Identity(), [(torch.eye(4), torch.tensor([0, -100, 1, -100]))]) == 0.5


def test_accuracy_reads_logits_of_an_output_object_and_inputs_by_name():
    class Classifier(nn.Module):
        def forward(self, values):
            return SimpleNamespace(logits=values)

    batches = [({"values": torch.eye(3)}, torch.tensor([0, 1, 1]))]
    assert reports.accuracy(Classifier(), batches, "cpu") == pytest.approx(2 / 3)


def test_accuracy_refuses_what_would_give_a_wrong_number():
    with pytest.raises(ValueError, match="gave no examples"):
        reports.accuracy(nn.Identity(), [])
    with pytest.raises(ValueError, match="none whose label counts"):
        reports.accuracy(nn.Identity(), [(torch.eye(3), torch.full((3,), -100))])
    with pytest.raises(ValueError, match=r"shape \(3, 1\), predictions \(3,\)"):
        reports.accuracy(nn.Identity(), [(torch.eye(3), torch.zeros(3, 1))])


@pytest.mark.parametrize("measured", [reports.accuracy, reports.perplexity])
@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_no_output_stands_for_is_told(measured, label):
    logits, labels = torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.long)
    labels[1, 2] = label
    model = nn.Identity() if measured is reports.accuracy else _Turned()
    with pytest.raises(ValueError, match=f"a batch has the label {label}, and the model has 3 outputs; expected class"):
        measured(model, [(logits, labels)])


def test_perplexity_is_of_causal_language_models():
    """Of a model with a decoder beside an encoder the logits are of the label at their own position."""
    with pytest.raises(ValueError, match=r"\(2, 3\), labels \(2,\); expected those of a causal language model"):
        reports.perplexity(nn.Identity(), [(torch.randn(2, 3), torch.tensor([0, 1]))])
    decoder = _Turned()
    decoder.config = SimpleNamespace(is_encoder_decoder=True)
    with pytest.raises(ValueError, match="_Turned has an encoder and a decoder, .* expected a causal language model"):
        reports.perplexity(decoder, [(torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.long))])


class _Turned(nn.Module):
    """Logits with the classes last."""

    def forward(self, logits):
        return logits.mT


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 2)])
def test_accuracy_refuses_a_model_without_an_output_for_each_class(shape):
    """The largest of one logit is class 0 whatever it says."""
    labels = torch.zeros(*shape[:1], *shape[2:], dtype=torch.long)
    with pytest.raises(ValueError, match="expected one output for each class"):
        reports.accuracy(nn.Identity(), [(torch.randn(shape), labels)])
