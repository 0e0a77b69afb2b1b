"""What everything else stands on, and what knows nothing of posteriors: models, batches, counting, noise, text."""
