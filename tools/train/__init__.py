"""Training of the shipped model: corpus, tokenizer, PyTorch model, export to GGUF, evaluation."""
