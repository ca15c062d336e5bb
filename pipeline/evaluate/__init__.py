"""Text out of a backbone."""
