"""Whole models of timm and transformers, small and untrained: their own forward, with moments in their own outputs."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.moments import Moments, parts, settings

RESNET = {"channels": (8, 16, 24, 32), "zero_init_last": False}
VIT = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
TIMM: dict[str, dict[str, Any]] = {
    "resnet18": RESNET,
    "resnet26d": RESNET,
    "resnext26ts": {"zero_init_last": False, "stem_type": "", "stem_pool": "maxpool", "width_factor": 0.5},
    "mobilenetv3_small_100": {},
    "efficientnet_b0": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "ls_init_value": 0.5},
    "vit_tiny_patch16_224": VIT,
    "vit_tiny_patch16_224, averaged": VIT | {"global_pool": "avg", "class_token": False},
    "deit_tiny_distilled_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 4,
        "depths": (1, 2),
        "embed_dim": 12,
        "num_heads": (1, 2),
    },
    "swinv2_tiny_window8_256": {
        "img_size": 32,
        "window_size": 4,
        "depths": (1, 2),
        "embed_dim": 12,
        "num_heads": (1, 2),
    },
    "mixer_s32_224": {"img_size": 64, "mlp_ratio": (0.5, 0.25)},
    "regnety_002": {"zero_init_last": False},
    "densenet121": {"growth_rate": 4, "block_config": (2, 2, 2, 2)},
    "vgg11_bn": {"mlp_ratio": 0.01},
    "ghostnet_050": {},
    "levit_128s": {"img_size": 32, "embed_dim": (8, 16), "depth": (1, 1), "num_heads": (2, 2), "key_dim": 4},
    "coat_lite_tiny": {"img_size": 32, "embed_dims": (8, 8, 16, 16), "serial_depths": (1, 1, 1, 1)},
    "xcit_nano_12_p16_224": {"img_size": 32, "depth": 1},
    "mobilevit_xxs": {},
}
SIZES = {"mixer_s32_224": 64}

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 32, "max_position_embeddings": 32, "initializer_range": 0.2}
DECODER = TEXT | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE |= {"image_size": 16, "patch_size": 8, "initializer_range": 0.2}
SEQ2SEQ = {"vocab_size": 40, "d_model": 16, "decoder_start_token_id": 0}
BART = SEQ2SEQ | {f"{part}_layers": 1 for part in ("encoder", "decoder")} | {"max_position_embeddings": 32}
BART |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
BART |= {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")}

IDS = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
SEEN = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CLASSES = {"input_ids": IDS, "attention_mask": SEEN, "labels": torch.tensor([0, 1])}
TOKENS = {"input_ids": IDS, "attention_mask": SEEN, "labels": IDS}
TARGETS = {"input_ids": IDS, "attention_mask": SEEN, "labels": IDS[:, :4].clone()}
PICTURES = {"pixel_values": PIXELS, "labels": torch.tensor([0, 1])}


@dataclass(frozen=True)
class HFCase:
    """A transformers model: its family, its head, its configuration, what it is called with."""

    family: str
    head: str
    config: dict[str, Any]
    inputs: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)

    def model(self, attention: str = "sdpa") -> nn.Module:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.family}Config")(**self.config, **self.extra)
        made = getattr(transformers, f"{self.family}{self.head}")._from_config(config, attn_implementation=attention)
        return made.eval()


CLASSIFIER, LM, PAIR, IMAGES = (
    "ForSequenceClassification",
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForImageClassification",
)
HF = [
    HFCase("Bert", CLASSIFIER, TEXT, CLASSES),
    HFCase("Bert", "ForMaskedLM", TEXT, TOKENS),
    HFCase("Roberta", CLASSIFIER, TEXT, CLASSES),
    HFCase("Electra", CLASSIFIER, TEXT, CLASSES),
    HFCase("Albert", CLASSIFIER, TEXT, CLASSES),
    HFCase(
        "DistilBert",
        CLASSIFIER,
        {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 32},
        CLASSES,
    ),
    HFCase(
        "GPT2",
        "LMHeadModel",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "tie_word_embeddings": False},
        TOKENS,
        {"bos_token_id": 1, "eos_token_id": 2},
    ),
    HFCase(
        "OPT",
        LM,
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32},
        TOKENS,
        {"max_position_embeddings": 32, "word_embed_proj_dim": 16},
    ),
    HFCase("Llama", LM, DECODER, TOKENS),
    HFCase("Mistral", LM, DECODER, TOKENS),
    HFCase("Qwen2", LM, DECODER, TOKENS),
    HFCase("Gemma", LM, DECODER, TOKENS),
    HFCase("GPTNeoX", LM, TEXT, TOKENS),
    HFCase("T5", PAIR, SEQ2SEQ | {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}, TARGETS),
    HFCase("Bart", PAIR, BART, TARGETS),
    HFCase(
        "Whisper",
        PAIR,
        BART | {"num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 8, "pad_token_id": 0},
        {"input_features": torch.randn(2, 4, 12), "labels": IDS[:, :4].clone()},
        {"bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
    HFCase("ViT", IMAGES, IMAGE, PICTURES),
    HFCase("DeiT", IMAGES, IMAGE, PICTURES),
    HFCase(
        "Swin",
        IMAGES,
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4},
        PICTURES,
    ),
    HFCase(
        "CLIP",
        "Model",
        {"text_config": TEXT | {"eos_token_id": 2}, "vision_config": IMAGE, "projection_dim": 8},
        {"input_ids": IDS, "attention_mask": SEEN, "pixel_values": PIXELS},
        {"return_loss": True},
    ),
]
WITHOUT_SDPA = HFCase(
    "ConvNext",
    IMAGES,
    {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "layer_scale_init_value": 0.5, "image_size": 16},
    PICTURES,
)


def ids(case: HFCase) -> str:
    return f"{case.family}{case.head}"


def timm_model(name: str) -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"num_classes": 5} | TIMM[name]
    model = timm.create_model(name.split(",")[0], pretrained=False, **options).eval()
    size = SIZES.get(name, 32)
    return model, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def check(output: Tensor, expected: Tensor) -> None:
    """Moments of the right shape, with variances that are finite and, but for padding, not zero."""
    assert type(output) is Moments
    assert output.shape == expected.shape
    assert output.variance.isfinite().all()
    assert (output.variance >= 0).all()
    assert (output.variance > 0).float().mean() > 0.9


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    """In evaluation and in training, where gradients reach the stds."""
    model, x = timm_model(name)
    with torch.no_grad():
        expected = model(x)
    bp.to_variational(model, relative_std=0.02)
    with bp.sampling(model, "moments"), torch.no_grad():
        check(model(x), expected)
    model.train()
    bp.to_variational(model, relative_std=0.02)
    with bp.sampling(model, "moments"):
        output = model(x)
    output = output[0] if isinstance(output, tuple) else output  # distilled models train two heads
    check(output, expected)
    (output.mean.square().sum() + output.variance.sum()).backward()
    stds = [p for name, p in model.named_parameters() if name.endswith("_log_std") and p.grad is not None]
    assert stds
    assert all(p.grad.isfinite().all() for p in stds)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", HF, ids=ids)
def test_transformers(case, attention):
    """The model's own output class, with its own loss, a plain tensor whose gradients reach the stds."""
    model = case.model(attention)
    with torch.no_grad():
        expected = model(**case.inputs)
    bp.to_variational(model, relative_std=0.02)
    for is_training in (False, True):
        model.train(is_training)
        with bp.sampling(model, "moments"):
            output = model(**case.inputs)
        assert type(output) is type(expected)
        assert output.keys() == expected.keys()
        name = "logits" if "logits" in output else "logits_per_image"
        check(output[name], expected[name])
        if output.get("loss") is not None:
            assert type(output.loss) is Tensor
            output.loss.backward()
    stds = [p for name, p in model.named_parameters() if name.endswith("_log_std") and p.grad is not None]
    assert all(p.grad.isfinite().all() for p in stds)
    assert stds or "labels" not in case.inputs


def test_transformers_without_attention():
    model = bp.to_variational(WITHOUT_SDPA.model("eager"), relative_std=0.02)
    with bp.sampling(model, "moments"):
        output = model(**WITHOUT_SDPA.inputs)
    check(output.logits, torch.empty(2, 2))


SAMPLED = ["resnet18", "vit_tiny_patch16_224", "vit_tiny_patch16_224, averaged", "swin_tiny_patch4_window7_224"]


def ratio_to_samples(model: nn.Module, call: Callable[[], Tensor], num_samples: int, **choices: Any) -> float:
    """Median over outputs of the propagated variance over that of weight samples."""
    bp.to_variational(model, relative_std=0.05)
    torch.manual_seed(2)
    with torch.no_grad():
        with bp.sampling(model, "moments"), settings(**choices):
            got = parts(call()).variance
        with bp.sampling(model, "weight_sampling"):
            found = torch.stack([call() for _ in range(num_samples)]).var(0)
    assert got is not None
    ratio = (got / found)[found > 0].median().item()
    print(f"propagated over sampled variance, median: {ratio:.3f}")
    return ratio


@pytest.mark.parametrize("name", SAMPLED)
def test_timm_against_weight_samples(name):
    model, x = timm_model(name)
    assert 0.7 < ratio_to_samples(model, lambda: model(x), 150) < 1.4


@pytest.mark.parametrize("case", [c for c in HF if c.family in ("Bert", "Llama", "T5", "GPT2")], ids=ids)
def test_transformers_against_weight_samples(case):
    """Wider, and with more classes: a median over outputs wants many that are made of many."""
    wide = {"hidden_size": 48, "intermediate_size": 64, "num_labels": 30} if "hidden_size" in case.config else {}
    wide = {"d_model": 48, "d_kv": 24, "d_ff": 64} if case.family == "T5" else wide
    wide |= {"head_dim": 24} if "head_dim" in case.config else {}
    model = replace(case, config=case.config | wide).model()
    assert 0.7 < ratio_to_samples(model, lambda: model(**case.inputs).logits, 120) < 1.4


def test_low_rank_covariance_against_weight_samples():
    model, x = timm_model("vit_tiny_patch16_224")
    ratio = ratio_to_samples(model, lambda: model(x), 150, covariance="low_rank", num_directions=100)
    assert 0.7 < ratio < 1.4


@pytest.mark.parametrize("name", TIMM)
def test_a_certain_input_of_a_timm_model_stays_certain(name):
    """Bit for bit the stock forward, no variance; and with a variance of 0, a variance of 0."""
    model, x = timm_model(name)
    with torch.no_grad():
        expected, output = model(x), model(Moments(x))
        assert torch.equal(output.mean + 0, expected)
        assert output.variance is None
        zero = model(Moments(x, torch.zeros_like(x)))
    assert (zero.variance == 0).all()
    torch.testing.assert_close(zero.mean + 0, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", [c for c in HF if "input_ids" in c.inputs and c.family != "CLIP"], ids=ids)
def test_a_certain_input_of_a_transformer_stays_certain(case):
    model = case.model()
    embedded = model.get_input_embeddings()(case.inputs["input_ids"]).detach()
    inputs = {name: value for name, value in case.inputs.items() if name not in ("input_ids", "labels")}
    if case.head == PAIR:
        inputs["decoder_input_ids"] = IDS[:, :3]
    with torch.no_grad():
        expected = model(inputs_embeds=embedded, **inputs).logits
        output = model(inputs_embeds=Moments(embedded), **inputs).logits
        zero = model(inputs_embeds=Moments(embedded, torch.zeros_like(embedded)), **inputs).logits
    assert torch.equal(output.mean + 0, expected)
    assert output.variance is None
    assert (zero.variance == 0).all()
    torch.testing.assert_close(zero.mean + 0, expected, rtol=1e-3, atol=1e-3)
