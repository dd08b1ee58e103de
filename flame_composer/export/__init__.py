"""The model card of a trained model, and its upload to the Hugging Face hub."""
