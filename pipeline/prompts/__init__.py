"""A sample as a prompt, and prompts as a batch."""
