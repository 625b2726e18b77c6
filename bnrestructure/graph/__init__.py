"""The typed IR over torch.fx, its verifier, and what patterns and passes ask of a graph; nothing here rewrites but ``inplace``."""
