"""Softmax over virtual tokens and the context: the kernel under every adapter of attention."""
