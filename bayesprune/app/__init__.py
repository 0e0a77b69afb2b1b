"""What the command line does: the pipeline, its checkpoints, data sets and tasks."""
