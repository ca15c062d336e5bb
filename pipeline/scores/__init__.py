"""Official result files in, numbers out: no model, no torch."""
