"""How a model is trained and judged: by a plain loop, or by the Trainer of transformers."""
