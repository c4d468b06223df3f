"""`python -m untrojan`."""

from untrojan.cli import main

main()
