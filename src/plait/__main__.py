"""``python -P -m plait``: the command line without its script."""

from plait.entry import main

main()
