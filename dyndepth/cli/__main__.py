"""`python -m dyndepth.cli`."""

from dyndepth.cli import main

main()
