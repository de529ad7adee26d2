"""Text: real sequences for measurements, and rows of tokens to train on."""
