"""Which channels leave together, found on the dependency graph of torch-pruning and tried on the model itself."""
