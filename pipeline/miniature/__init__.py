"""The miniature: a synthetic visual world, and tiny real backbones that learn in context in it."""
