"""What is kept of every trial, and the way back from a number: MLflow behind `runs`, git and files in `provenance`."""
