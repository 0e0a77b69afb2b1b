"""Cases as data: layers with input shapes, and timm architectures with the smallest sensible input."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

STRUCTURES = ("per_weight", "rank_one", "per_channel")


@dataclass(frozen=True)
class LayerCase:
    """A layer, the shape of an input, and what else its forward takes; `is_local`: each weight meets one position."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    is_local: bool = False

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(self.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))

    def layer(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(2)
        return self.build().to(dtype)


LAYERS = [
    LayerCase("linear", lambda: nn.Linear(4, 3), (3, 4), is_local=True),
    LayerCase("linear_without_bias", lambda: nn.Linear(4, 3, bias=False), (3, 4), is_local=True),
    LayerCase("linear_one_example", lambda: nn.Linear(4, 3), (4,), is_local=True),
    LayerCase("linear_tokens", lambda: nn.Linear(4, 3), (2, 3, 4)),
    LayerCase("linear_image_last", lambda: nn.Linear(3, 2), (2, 2, 2, 3)),
    LayerCase("conv1d", lambda: nn.Conv1d(2, 3, 3), (2, 2, 6)),
    LayerCase("conv1d_circular", lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), (2, 2, 4)),
    LayerCase("conv2d", lambda: nn.Conv2d(2, 2, 2, stride=2, dilation=2, padding=1), (2, 2, 5, 4)),
    LayerCase("conv2d_one_pixel", lambda: nn.Conv2d(4, 3, 1), (3, 4, 1, 1), is_local=True),
    LayerCase("conv2d_one_image", lambda: nn.Conv2d(2, 2, 2), (2, 3, 3)),
    LayerCase("conv2d_groups", lambda: nn.Conv2d(4, 4, 2, groups=2), (2, 4, 3, 3)),
    LayerCase("conv2d_depthwise", lambda: nn.Conv2d(3, 6, 2, groups=3, bias=False), (2, 3, 3, 3)),
    LayerCase("conv2d_same", lambda: nn.Conv2d(2, 2, 3, padding="same"), (2, 2, 3, 2)),
    LayerCase("conv2d_reflect", lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (2, 1, 3, 3)),
    LayerCase("conv2d_replicate", lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="replicate"), (2, 1, 3, 3)),
    LayerCase("conv3d", lambda: nn.Conv3d(2, 2, 2, groups=2), (2, 2, 2, 3, 3)),
    LayerCase("transposed1d", lambda: nn.ConvTranspose1d(3, 2, 3, stride=2), (2, 3, 3)),
    LayerCase("transposed2d_groups", lambda: nn.ConvTranspose2d(4, 4, 2, groups=2), (2, 4, 1, 2)),
    LayerCase(
        "transposed2d_output_size",
        lambda: nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1),
        (2, 2, 2, 2),
        {"output_size": (4, 4)},
    ),
    LayerCase("transposed3d", lambda: nn.ConvTranspose3d(2, 1, 2, dilation=2), (2, 2, 2, 1, 2)),
]
layers = pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
structures = pytest.mark.parametrize("std", STRUCTURES)


def small_net() -> nn.Module:
    """A network for images (N, 1, 4, 4): 2 layers with posteriors, one without."""
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


class Tied(nn.Module):
    """Two layers with one weight, as in an autoencoder or a language model."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        second.weight = first.weight

    def forward(self, x):
        return self.second(self.first(x))


@dataclass(frozen=True)
class TimmCase:
    """A timm architecture, the input size and arguments that keep it small.

    Attributes:
        raw: How the names of parameters end that the model uses without calling their layer's forward.
    """

    name: str
    size: int = 64
    kwargs: dict[str, Any] = field(default_factory=dict)
    raw: tuple[str, ...] = ()

    def model(self) -> nn.Module:
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        return timm.create_model(self.name, pretrained=False, num_classes=10, **self.kwargs)

    def input(self) -> Tensor:
        return torch.randn(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))


_SMALL = {"img_size": 64}
_QKV = ("attn.qkv.weight",)
TIMM = [
    TimmCase("resnet18"),
    TimmCase("tf_efficientnet_b0"),
    TimmCase("mobilenetv3_small_050"),
    TimmCase("convnext_atto"),
    TimmCase("vit_tiny_patch16_224", kwargs=_SMALL),
    TimmCase("swin_tiny_patch4_window7_224", kwargs={"img_size": 56, "embed_dim": 24}, size=56),
    TimmCase("test_nfnet"),
    TimmCase("regnetx_002"),
    TimmCase("densenet121"),
    TimmCase("resnetv2_50x1_bit"),
    TimmCase("beit_base_patch16_224", kwargs={**_SMALL, "depth": 2, "embed_dim": 48, "num_heads": 3}, raw=_QKV),
    TimmCase("eva02_tiny_patch14_224", size=70, kwargs={"img_size": 70, "depth": 2}, raw=_QKV),
    TimmCase("deit_tiny_distilled_patch16_224", kwargs={**_SMALL, "depth": 3}),
    TimmCase("cait_xxs24_224", kwargs={**_SMALL, "depth": 2}),
    TimmCase("mixer_s32_224", kwargs={**_SMALL, "mlp_ratio": (0.5, 0.25)}),
    TimmCase("gmlp_ti16_224", kwargs=_SMALL),
    TimmCase("ghostnet_050"),
    TimmCase("hrnet_w18_small"),
    TimmCase("xcit_nano_12_p16_224", kwargs={**_SMALL, "depth": 2}),
    TimmCase("mobilevit_xxs"),
    TimmCase("poolformer_s12"),
    TimmCase("pvt_v2_b0"),
    TimmCase("edgenext_xx_small"),
    TimmCase("dla46_c"),
    TimmCase("rexnet_100"),
    TimmCase("lcnet_035"),
    TimmCase("repvgg_a0"),
    TimmCase("fastvit_t8"),
    TimmCase("mambaout_femto"),
    TimmCase("starnet_s1"),
    TimmCase("skresnet18"),
    TimmCase("lambda_resnet26t"),
    TimmCase("tf_mixnet_s"),
    TimmCase("tf_efficientnet_cc_b0_4e"),
    TimmCase("efficientvit_b0"),
    TimmCase("inception_next_atto"),
]
timm_models = pytest.mark.parametrize("case", TIMM, ids=lambda case: case.name)
