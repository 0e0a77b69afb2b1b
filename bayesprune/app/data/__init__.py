"""Data sets of the command line: images, texts, and how they are split."""
