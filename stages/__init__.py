"""The DVC stages: params in, one call into pipeline, outputs out."""
