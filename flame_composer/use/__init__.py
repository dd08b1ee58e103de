"""Uses of a trained model: evaluation, scores in tasks, and generation."""
