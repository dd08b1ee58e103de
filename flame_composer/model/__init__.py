"""The model: any fla or Hugging Face causal language model, built, loaded and transplanted."""
