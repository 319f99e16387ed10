"""Surrogate problems, one a file: fields, splits, normalisation, training loss and presets."""
