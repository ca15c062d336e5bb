"""What the benchmarks share: workloads, steps, trials, timing, and the results as a table."""
