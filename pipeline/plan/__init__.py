"""From studies to trials, as plain values: settings laid over one another, cells and points, the plan and its order."""
