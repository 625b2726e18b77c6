"""The ``bnrestructure`` command: one file for each subcommand. Nothing here imports torch before a subcommand runs."""
