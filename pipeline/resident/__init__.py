"""What stays in a process from trial to trial: the backbone and what was computed with it."""
