"""Tritwise: language models whose weights are only ever −1, 0 or +1."""
