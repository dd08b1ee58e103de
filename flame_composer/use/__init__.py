"""What a trained model is used for: evaluation, tasks, generation."""
