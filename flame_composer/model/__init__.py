"""Causal language models of fla and Hugging Face: built, loaded, converted and optimised."""
