"""What the stages train and evaluate do: from a study to trained, scored trials, in MLflow too."""
