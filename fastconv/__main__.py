"""``python -m fastconv``: the same as the command ``fastconv``."""

from fastconv.cli import main

main()
