"""``python -m study <verb>``."""

from study.cli import main

main()
