"""Causal language models of fla and Hugging Face: their configs, building, loading, transplant."""
