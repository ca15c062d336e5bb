"""Samples: from official files to token ids."""
