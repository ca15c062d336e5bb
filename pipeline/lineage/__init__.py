"""The way back from a number, and forward again: what `hificl trace` and `hificl reproduce` do."""
