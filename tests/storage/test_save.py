"""A saved model comes back: values, shapes, attributes, ties, dtypes, stds and masks; the model itself is unchanged."""

import json

import pytest
import torch
import torch_pruning as tp
from safetensors.torch import load_file
from torch import nn

import bayesprune as bp
from bayesprune.errors import UnsupportedModelError
from bayesprune.layers.shuffled import ShuffledConv2d


class Net(nn.Module):
    """A convolution, a grouped one, norms, and a head: layers whose attributes must follow their shapes."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.width = width
        self.conv = nn.Conv2d(3, width, 3, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)
        self.register_buffer("scale", torch.linspace(1, 2, 4), persistent=False)

    def forward(self, x):
        x = self.depthwise(torch.relu(self.bn(self.conv(x))))
        return self.head(self.norm(x.mean((2, 3)))) * self.scale


class Tied(nn.Module):
    """A tied decoder, and a module that stands at two places."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.inner = nn.Linear(6, 6)
        self.again = self.inner
        self.decoder = nn.Linear(6, 10, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x):
        return self.decoder(self.again(self.inner(self.embedding(x))))


def pruned() -> Net:
    model = Net().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), model.bn.running_mean):
            tensor.normal_()
    removed = [0, 3, 6]
    tp.prune_conv_out_channels(model.conv, removed)
    tp.prune_batchnorm_out_channels(model.bn, removed)
    tp.prune_depthwise_conv_out_channels(model.depthwise, removed)
    tp.prune_layernorm_out_channels(model.norm, removed)
    tp.prune_linear_in_channels(model.head, removed)
    return model


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_pruned_module_comes_back(tmp_path):
    model = pruned()
    bp.save(model, tmp_path / "new" / "directory")
    loaded = bp.load(tmp_path / "new" / "directory", model=Net())
    assert not loaded.training
    assert torch.equal(loaded(images()), model(images()))
    assert loaded.conv.out_channels == loaded.bn.num_features == loaded.depthwise.groups == loaded.head.in_features == 5
    assert loaded.norm.normalized_shape == (5,)
    assert loaded.width == 8  # nobody changed it


def test_loaded_module_trains(tmp_path):
    bp.save(pruned(), tmp_path)
    loaded = bp.load(tmp_path, model=Net()).train()
    loaded(images()).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in loaded.parameters())


def test_directory_holds_no_other_files(tmp_path):
    bp.save(pruned(), tmp_path)
    bp.save(pruned(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bayesprune.json", "model.safetensors"]
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_second_save_replaces_the_first(tmp_path):
    bp.save(pruned(), tmp_path)
    model = Net(3).eval()
    bp.save(model, tmp_path)
    assert torch.equal(bp.load(tmp_path, model=Net())(images()), model(images()))


def test_right_shapes_keep_the_parameters(tmp_path):
    bp.save(pruned(), tmp_path)
    other = pruned()
    before = dict(other.named_parameters())
    bp.load(tmp_path, model=other)
    assert all(parameter is before[name] for name, parameter in other.named_parameters())


def test_saving_changes_neither_model_nor_random_numbers(tmp_path):
    model = pruned().train()
    model.conv.weight.requires_grad_(False)
    state, attributes = {k: v.clone() for k, v in model.state_dict().items()}, dict(vars(model))
    generator = torch.get_rng_state()
    bp.save(model, tmp_path)
    assert torch.equal(generator, torch.get_rng_state())
    assert vars(model) == attributes
    assert model.training
    assert not model.conv.weight.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_comes_back(tmp_path, dtype):
    model = pruned().to(dtype)
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=Net())
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded.scale.dtype == dtype
    assert loaded.bn.num_batches_tracked.dtype == torch.int64
    assert torch.equal(loaded(images(dtype)), model(images(dtype)))


def test_tied_tensors_are_saved_once_and_tied_again(tmp_path):
    model = Tied().eval()
    bp.save(model, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {"embedding.weight", "inner.weight", "inner.bias"}
    loaded = bp.load(tmp_path, model=Tied())
    assert loaded.decoder.weight is loaded.embedding.weight
    assert loaded.again is loaded.inner
    tokens = torch.arange(10)
    assert torch.equal(loaded(tokens), model(tokens))


def test_resized_tied_tensors_stay_tied(tmp_path):
    model = Tied().eval()
    model.embedding.weight = model.decoder.weight = nn.Parameter(torch.randn(7, 6))
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=Tied())
    assert loaded.decoder.weight is loaded.embedding.weight
    assert torch.equal(loaded(torch.arange(7)), model(torch.arange(7)))


def test_untied_tensors_stay_untied(tmp_path):
    model = Tied().eval()
    model.decoder.weight = nn.Parameter(torch.randn(10, 6))
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=Tied())
    assert loaded.decoder.weight is not loaded.embedding.weight
    assert torch.equal(loaded(torch.arange(10)), model(torch.arange(10)))


def test_views_of_one_storage_and_strided_tensors_are_saved(tmp_path):
    def layers() -> nn.Module:
        return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))).eval()

    model, both = layers(), torch.randn(8, 4)
    for layer, weight in zip(model, (both[:4], both[4:].T, both[:4]), strict=True):
        layer.weight = nn.Parameter(weight)
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=layers())
    assert all(torch.equal(new.weight, old.weight) for new, old in zip(loaded, model, strict=True))


def test_lstm_runs_after_loading(tmp_path):
    model = nn.LSTM(4, 3)
    model.bias_ih_l0 = nn.Parameter(model.bias_ih_l0.detach().double().float() + 1)
    bp.save(model.double(), tmp_path)
    loaded = bp.load(tmp_path, model=nn.LSTM(4, 3))
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(loaded(x)[0], model(x)[0])


@pytest.mark.parametrize("std", ["per_weight", "rank_one", "per_channel"])
def test_variational_model_comes_back(tmp_path, std):
    model = bp.to_variational(
        pruned(), std=std, estimator="weight_sampling", filter_fn=lambda _, name: name != "depthwise"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    bp.prune_weights(model, "weights=0.5")
    model.head.estimator = "flipout"
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=Net())
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert {"conv.weight_mask", "head.bias_log_std"} <= state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert type(loaded.depthwise) is nn.Conv2d
    assert (loaded.conv.std, loaded.conv.estimator, loaded.head.estimator) == (std, "weight_sampling", "flipout")
    outputs = []
    for each in (model.train(), loaded.train()):
        torch.manual_seed(3)
        outputs.append(each(images()))
    assert torch.equal(*outputs)


def test_variational_layer_under_two_names_comes_back(tmp_path):
    model = bp.to_variational(Tied())
    bp.prune_weights(model, "weights=0.5")
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=Tied())
    assert loaded.again is loaded.inner
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_grouped_convolution_under_two_names_comes_back(tmp_path):
    def net(conv: nn.Conv2d) -> nn.Sequential:
        return nn.Sequential(conv, nn.ReLU(), conv)

    conv = nn.Conv2d(4, 4, 3, padding=1)
    grouped = ShuffledConv2d.like(conv, groups=2)
    grouped.order(torch.tensor([2, 0, 1, 3]), torch.arange(4))
    bp.save(net(grouped), tmp_path)
    loaded = bp.load(tmp_path, model=net(conv))
    x = torch.randn(2, 4, 5, 5)
    assert loaded[2] is loaded[0]
    assert torch.equal(loaded(x), net(grouped)(x))


def test_variational_bfloat16_keeps_float32_stds(tmp_path):
    model = bp.to_variational(pruned().bfloat16())
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=Net())
    assert loaded.conv.weight.dtype == torch.bfloat16
    assert loaded.conv.weight_log_std.dtype == torch.float32


def test_variational_model_loads_into_a_variational_one(tmp_path):
    bp.save(bp.to_variational(pruned()), tmp_path)
    other = bp.to_variational(pruned())
    assert bp.load(tmp_path, model=other).conv.std == "per_weight"


def test_zeros_of_a_deterministic_model_stay(tmp_path):
    model = bp.to_variational(pruned())
    bp.prune_weights(model, "weights=0.5")
    bp.to_deterministic(model)
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=Net())
    assert torch.equal(loaded.conv.weight == 0, model.conv.weight == 0)
    assert (loaded.conv.weight == 0).sum() > 0


def test_record_names_versions_history_and_report(tmp_path):
    bp.save(pruned(), tmp_path, history=[{"step": 1}], report={"accuracy": 0.5})
    record = json.loads((tmp_path / "bayesprune.json").read_text())
    assert record["format_version"] == 2
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0] or record["versions"]["torch"]
    assert record["history"] == [{"step": 1}]
    assert record["report"] == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"history": [torch.zeros(1)]}, TypeError, "history is not a JSON value"),
        ({"report": {1j: 2}}, TypeError, "report is not a JSON value"),
        ({"model_args": {"img_size": 64}}, ValueError, "saved as a plain module"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, error, said):
    with pytest.raises(error, match=said):
        bp.save(pruned(), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"step": 1}


def meta_model() -> nn.Module:
    return nn.Linear(2, 2, device="meta")


def sparse_model() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("adjacency", torch.eye(2).to_sparse())
    return model


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: torch.compile(pruned()), "_orig_mod"),
        (lambda: nn.DataParallel(pruned()), "wrapped in DataParallel"),
        (lambda: WithExtraState(2, 2), "_extra_state.*dict"),
        (meta_model, "weight.*meta"),
        (sparse_model, "adjacency.*sparse"),
    ],
)
def test_models_that_cannot_be_saved_are_refused(tmp_path, build, said):
    with pytest.raises(UnsupportedModelError, match=said):
        bp.save(build(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_no_module_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"OrderedDict in place of a model; expected a torch\.nn\.Module"):
        bp.save(pruned().state_dict(), tmp_path / "new")
