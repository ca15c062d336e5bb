"""The resident pool: slots that outlive trials, and the queue in front of them."""
