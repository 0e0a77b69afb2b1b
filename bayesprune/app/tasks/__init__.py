"""Training and evaluation of a model, by a plain loop or by the Trainer of transformers."""
