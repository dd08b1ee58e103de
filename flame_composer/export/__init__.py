"""A trained model as a Hugging Face folder with a model card."""
