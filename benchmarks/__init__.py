"""Measurements: of whole models, of kernels, of rivals."""
