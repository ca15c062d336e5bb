"""`python -m pipeline` is `hificl`."""

from pipeline.cli import main

main()
