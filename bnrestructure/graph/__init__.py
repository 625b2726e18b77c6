"""Helpers over torch.fx graphs that patterns and passes share; nothing here rewrites."""
