"""From a Transformer to a B'MOJO checkpoint: sources, families, initial values, the account and its check."""
