"""``python -P -m plait``: the command line without its script."""

from plait.cli import main

main()
