"""What every program stands on: files and folders written whole, settings, weights, running models, provenance."""
