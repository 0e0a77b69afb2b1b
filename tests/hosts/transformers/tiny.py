"""Tiny models with random weights, data that can be learned, and a Trainer over them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

VOCABULARY = 32
LENGTH = 8
NUM_EXAMPLES = 48


def bert(**config: Any) -> PreTrainedModel:
    """A classifier of two layers, without dropout, so that the posterior's noise is the only one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, num_labels=3, **sizes | no_dropout | config)
    )
    model.accepts_loss_kwargs = False  # the head ignores num_items_in_batch
    return model


def llama(**config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, intermediate_size=24, **sizes | config))


def classification(count: int = NUM_EXAMPLES) -> list[dict[str, Any]]:
    """The label is what the first token says."""
    tokens = torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row.tolist(), "labels": int(row[0]) % 3} for row in tokens]


def language(count: int = NUM_EXAMPLES) -> list[dict[str, Any]]:
    """Each token is the one before plus one; the first tokens, a varying number of them, have no label."""
    rows = []
    for index in range(count):
        tokens = [(index + position) % VOCABULARY for position in range(LENGTH)]
        rows.append({"input_ids": tokens, "labels": [-100] * (1 + index % 3) + tokens[1 + index % 3 :]})
    return rows


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def arguments(directory: Path | str, **options: Any) -> TrainingArguments:
    defaults = {
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "optim": "adamw_torch",
    }
    return TrainingArguments(output_dir=str(directory), **defaults | options)


def trainer(
    model: PreTrainedModel, directory: Path | str, callback: TrainerCallback, *others: TrainerCallback, **options: Any
) -> Trainer:
    """A stock Trainer whose only unusual argument is the callback."""
    is_classifier = "Classification" in type(model).__name__
    data = classification() if is_classifier else language()
    return Trainer(
        model=model,
        args=arguments(directory, **options),
        train_dataset=data,
        eval_dataset=data[:16],
        compute_metrics=accuracy if is_classifier else None,
        callbacks=[callback, *others],
    )
