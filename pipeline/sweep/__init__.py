"""What the stages subsample, train and evaluate do: from drawn samples to trained, scored trials, in MLflow too."""
