"""The table of timm's architectures as a page of the documentation, and which models stand for their modules."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rows import CUT, OK
from zeros import EQUAL

OVERFLOW = "a layer has fewer channels than the graph leads to it: an operation in between"
CHECKS = {
    "exact": "eval output unchanged by conversion",
    "step": "one training step with `attach`",
    "moments": "mean and variance of the output in one pass",
    "equal": EQUAL,
    "cut": "`prune_channels`, then one training step; the share of the MACs that is kept, half of them being asked for",
    "loaded": "what is left saved, and loaded in another process by `bayesprune.load` and `timm.create_model`",
    "back": "converted back to stock classes and keys",
    "torch_pruning": "torch-pruning alone, with its MagnitudeImportance, and one backward; the share of MACs kept",
}
MODELS = {
    "beit_base_patch16_224": "beit",
    "halonet_h1": "byoanet",
    "lambda_resnet26t": "byoanet",
    "repvgg_a0": "byobnet",
    "cait_xxs24_224": "cait",
    "coat_tiny": "coat",
    "convit_tiny": "convit",
    "convmixer_768_32": "convmixer",
    "convnext_atto": "convnext",
    "cpubone_nano": "cpubone",
    "crossvit_tiny_240": "crossvit",
    "csatv2": "csatv2",
    "cs3darknet_focus_s": "cspnet",
    "cspnext_tiny": "cspnext",
    "davit_tiny": "davit",
    "deepseek_vit_412m": "deepseek_vit",
    "deit_tiny_patch16_224": "deit",
    "densenet121": "densenet",
    "dla46x_c": "dla",
    "dpn48b": "dpn",
    "edgenext_xx_small": "edgenext",
    "efficientformer_l1": "efficientformer",
    "efficientformerv2_s0": "efficientformer_v2",
    "efficientnet_b0": "efficientnet",
    "mobilenetv2_100": "efficientnet",
    "efficientvim_m1": "efficientvim",
    "efficientvit_b0": "efficientvit_mit",
    "efficientvit_m0": "efficientvit_msra",
    "eva02_tiny_patch14_224": "eva",
    "vit_tiny_patch16_dinov3_qkvb": "eva",
    "fasternet_t0": "fasternet",
    "fastvit_t8": "fastvit",
    "focalnet_tiny_srf": "focalnet",
    "gcvit_xxtiny": "gcvit",
    "gemma4_vit_167m": "gemma4_vit",
    "ghostnet_050": "ghostnet",
    "hardcorenas_b": "hardcorenas",
    "hgnetv2_b0": "hgnet",
    "hiera_tiny_224": "hiera",
    "sam2_hiera_tiny": "hieradet_sam2",
    "hrnet_w18_small": "hrnet",
    "iformer_t": "iformer",
    "inception_next_atto": "inception_next",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2_small": "lcnetv2",
    "levit_128s": "levit",
    "lowformer_b0": "lowformer",
    "mambaout_femto": "mambaout",
    "coatnet_pico_rw_224": "maxxvit",
    "test_maxvit": "maxxvit",
    "poolformerv2_s12": "metaformer",
    "gmlp_ti16_224": "mlp_mixer",
    "mobilenetv3_small_050": "mobilenetv3",
    "mobilenetv5_base": "mobilenetv5",
    "mobilevit_xxs": "mobilevit",
    "mvitv2_tiny": "mvitv2",
    "naflexvit_base_patch16_parfac_gap": "naflexvit",
    "nasnetalarge": "nasnet",
    "nest_tiny": "nest",
    "nextvit_small": "nextvit",
    "nf_regnet_b0": "nfnet",
    "pit_ti_224": "pit",
    "pnasnet5large": "pnasnet",
    "pvt_v2_b0": "pvt_v2",
    "qwen3_vit_88m": "qwen3_vit",
    "rdnet_tiny": "rdnet",
    "regnetx_002": "regnet",
    "repghostnet_050": "repghost",
    "repvit_m1": "repvit",
    "res2next50": "res2net",
    "resnest14d": "resnest",
    "resnet18": "resnet",
    "resnext50_32x4d": "resnet",
    "seresnext26d_32x4d": "resnet",
    "resnetv2_18": "resnetv2",
    "rexnet_100": "rexnet",
    "selecsls42": "selecsls",
    "legacy_seresnet18": "senet",
    "sequencer2d_s": "sequencer",
    "shvit_s1": "shvit",
    "skresnet18": "sknet",
    "starnet_s050": "starnet",
    "swiftformer_xs": "swiftformer",
    "swin_tiny_patch4_window7_224": "swin_transformer",
    "swinv2_tiny_window8_256": "swin_transformer_v2",
    "swinv2_cr_tiny_224": "swin_transformer_v2_cr",
    "tiny_vit_5m_224": "tiny_vit",
    "tnt_s_legacy_patch16_224": "tnt",
    "tresnet_m": "tresnet",
    "twins_svt_small": "twins",
    "vgg11": "vgg",
    "visformer_tiny": "visformer",
    "vit_tiny_patch16_224": "vision_transformer",
    "vit_tiny_r_s16_p8_224": "vision_transformer_hybrid",
    "vit_srelpos_small_patch16_224": "vision_transformer_relpos",
    "samvit_base_patch16_224": "vision_transformer_sam",
    "vitamin_small_224": "vitamin",
    "volo_d1_224": "volo",
    "ese_vovnet19b_slim_dw": "vovnet",
    "legacy_xception": "xception",
    "xception41p": "xception_aligned",
    "xcit_nano_12_p8_224": "xcit",
}


def page(done: dict[str, Any]) -> str:
    """The page of the documentation."""
    versions = _shown_versions(done["versions"])
    rows = done["rows"]
    peer = done.get("peer_versions")
    kept = [f"That column is kept from a run with {_shown_versions(peer)}."] if peer else []
    if older := [name for name, row in rows.items() if row.get("older")]:
        kept += ["", f"Kept from a run before the dependency graph was checked at every layer: {', '.join(older)}."]
    works = {check: [name for name, row in rows.items() if _works(row, check)] for check in CHECKS}
    half = [name for name in works["cut"] if rows[name]["kept"] <= CUT + 0.005]
    header = "| " + " | ".join(check.replace("_", " ") for check in CHECKS) + " |"
    lines = [
        "# The timm zoo",
        "",
        "One model of every module of timm, of the smaller ones, with random weights and the smallest images it takes:",
        f"`python tests/benchmarks/zoo.py` ({versions}).",
        "'yes' after loading means that the outputs are equal to the last bit by both routes. Beside it stands what",
        "torch-pruning alone makes of it, told the output layer and the heads of attention as in its own examples; it",
        "is stopped where it does not end. deepseek_vit_412m is built with two blocks, to fit into memory.",
        *kept,
        "",
        *(f"- **{name.replace('_', ' ')}**: {what}" for name, what in CHECKS.items()),
        "",
        "| " + header,
        "|---|" + "---|" * len(CHECKS),
        f"| of {len(rows)} | " + " | ".join(str(len(names)) for names in works.values()) + " |",
        "",
        f"Of the {len(works['cut'])} that were cut, {len(half)} reached half of the MACs; below it is said what limits",
        "the others.",
        "",
        *_compared(rows[name]["equal"] for name in works["equal"]),
        "",
        "| module: model | image " + header,
        "|---|---|" + "---|" * len(CHECKS),
    ]
    notes: list[str] = []
    for name, row in rows.items():
        cells = []
        for check in CHECKS:
            value = row.get(check, row.get("crash", "not run"))
            if not _works(row, check):
                notes.append(f"{len(notes) + 1}. {name}, {check.replace('_', ' ')}: {value}")
                value = f"no [{len(notes)}]"
            elif check == "cut":
                value = f"{row['kept']:.2f}"
            cells.append(value.removeprefix(f"{OK}, "))
        lines.append(f"| {MODELS[name]}: {name} | {row['shape'][-1] if 'shape' in row else ''} | {' | '.join(cells)} |")
    lines += ["", "## What does not work, and why", "", *(notes or ["Nothing."])]
    lines += ["", "## What keeps more than half of its MACs, and what stays whole", ""]
    limits = [
        f"- **{name}** ({rows[name]['kept']:.2f}): {_shown(rows[name])}" for name in works["cut"] if name not in half
    ]
    lines += limits or ["Nothing."]
    lines += ["", "## What stays whole in all models", "", "Layers by reason; sizes and names of layers left out.", ""]
    reasons: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for row in rows.values():
        found = Counter[str]()
        for reason, layers in row.get("left_whole", {}).items():
            found[_without_names(reason)] += layers
        reasons += found
        models.update(found.keys())
    lines += ["| reason | layers | models |", "|---|---|---|"]
    lines += [f"| {reason} | {layers} | {models[reason]} |" for reason, layers in reasons.most_common()]
    return "\n".join(lines) + "\n"


def _compared(said: Iterable[str]) -> list[str]:
    """How many groups the models were compared without, and why not the others."""
    counts = [tuple(map(int, re.findall(r"\d+", value))) for value in said]
    compared, found = (sum(column) for column in zip(*counts, strict=True))
    return [
        f"{compared:,} of their {found:,} groups of channels, heads and hidden units are compared; where a model does",
        "not run without every second channel of a group, `prune_channels` leaves that whole.",
    ]


def _shown_versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _shown(row: dict[str, Any]) -> str:
    reasons = sorted(row["left_whole"].items(), key=lambda item: -item[1])
    return "; ".join(f"{reason} ({layers} layers)" for reason, layers in reasons[:5])


def _without_names(reason: str) -> str:
    """The reason without what differs from model to model."""
    reason = re.sub(r" \((\w*Error: .*)\)(?=$|: )", "", reason)
    reason = re.sub(r"(another order) \S+ does", r"\1 a layer does", reason)
    reason = re.sub(r"about it: .+ in between", "about it: an operation in between", reason)
    reason = re.sub(r"^\S+ has \d+ channels and the graph leads \d+ to it: .+ in between", OVERFLOW, reason)
    reason = re.sub(r"; do that behind \S+,", "; do that behind it,", reason)
    reason = re.sub(r"^\S+ \(\w+\) or another module", "its own or another module", reason)
    reason = re.sub(r"(graph gives|know|weight of|cut) \S+", r"\1 a layer", reason)
    return re.sub(r"^\S+(?= (normalises|works|would|\())", "a layer", reason)


def _works(row: dict[str, Any], check: str) -> bool:
    return row.get(check, "").startswith(OK)
