"""What the two papers print: their figures (papers.yaml) and their hyperparameters (settings.yaml)."""
