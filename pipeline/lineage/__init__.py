"""The way back from a number, and forward again: trace, reproduce, predict, doctor, gc; one file a command."""
