"""Evolutionary, training-aware structured pruning of large language models."""
