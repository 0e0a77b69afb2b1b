"""What was pruned and rounded runs elsewhere, and computes the same there: torch.export, ONNX Runtime, torchao."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.bits import to_onnx_int8, to_torchao_int8
from bayesprune.bits.int8 import int8_parts


def net() -> nn.Sequential:
    convolution = (nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 5)).eval()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 3, 8, 8, generator=generator), torch.randint(5, (32,), generator=generator)


def cut() -> nn.Sequential:
    model = net()
    bp.prune_channels(model, torch.zeros(1, 3, 8, 8), "macs=0.6", importance=tp.importance.MagnitudeImportance())
    return model


def sparse(batch) -> nn.Sequential:
    model = bp.laplace.fit_laplace(bp.to_variational(net()), [batch])
    bp.prune_weights(model, "weights=0.3")
    return bp.to_deterministic(model)


def rounded(batch, **options) -> nn.Sequential:
    model = cut()
    bp.quantize(model, [batch], **options)
    return model


def level(batch) -> nn.Sequential:
    model = net()
    return bp.elastic.levels(model, batch[0][:1], ["macs=0.7"], data=[batch])[0].model


@pytest.mark.parametrize("kind", ["cut", "sparse", "rounded", "level"])
def test_torch_export(kind, batch):
    model = {"cut": lambda _: cut(), "sparse": sparse, "rounded": lambda b: rounded(b, bits=4), "level": level}[kind](
        batch
    )
    exported = torch.export.export(model.eval(), (batch[0],))
    with torch.no_grad():
        assert torch.equal(exported.module()(batch[0]), model(batch[0]))


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_onnx_runtime_computes_the_same_from_integers(per, batch):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    model = rounded(batch, bits=6, per=per)
    program = torch.onnx.export(model, (batch[0],), dynamo=True, optimize=False, verbose=False).model_proto

    def outputs() -> Tensor:
        session = runtime.InferenceSession(program.SerializeToString())
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: batch[0].numpy()})[0])

    before, size = outputs(), len(program.SerializeToString())
    with torch.no_grad():
        assert torch.allclose(before, model(batch[0]), atol=1e-5)
    assert set(to_onnx_int8(program)) == {"0.weight", "5.weight", "7.weight"}
    onnx.checker.check_model(program)
    assert torch.equal(outputs(), before)
    weights = sum(model[at].weight.numel() for at in (0, 5, 7))
    assert size - len(program.SerializeToString()) > 2 * weights


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_torchao_computes_the_same_from_integers(per, batch):
    pytest.importorskip("torchao")
    model = rounded(batch, bits=6, per=per)
    packed = copy.deepcopy(model)
    assert to_torchao_int8(packed) == ["5.weight", "7.weight"]
    assert packed[5].weight.qdata.dtype == torch.int8
    with torch.no_grad():
        assert torch.equal(packed(batch[0]), model(batch[0]))


def test_integers_times_steps_are_the_weights():
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-127, 128, (20, 30), generator=generator)
    for step in (torch.full((1, 1), 0.0625 * 1.25), torch.rand(20, 1, generator=generator).bfloat16().float()):
        found = int8_parts(integers * step)
        assert found is not None
        assert torch.equal(found[0] * found[1], integers * step)
    assert int8_parts(torch.randn(20, 30, generator=generator)) is None
    assert int8_parts((20 * integers + 1) * 0.5) is None
    assert int8_parts(integers[:2, :3] * 0.5) is None
