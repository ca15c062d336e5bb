"""What every room stands on: errors, files, YAML, paths, registries, progress, answers on a terminal."""
