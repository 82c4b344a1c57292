"""Pretraining of the shipped CLIP: `python -m tools.pretrain clip` and `clip-export`."""
