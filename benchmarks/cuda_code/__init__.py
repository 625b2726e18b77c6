"""What a training step would launch on a GPU, and the least time that it can take there, counted: see __main__.py."""
