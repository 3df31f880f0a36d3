"""Hugging Face folders and hub ids: configs, weights, tokenizers and model cards, in and out."""
