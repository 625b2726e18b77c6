"""Checks and times everything on one NVIDIA GPU: see __main__.py."""
