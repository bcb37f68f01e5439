"""`python -m graphopt`: the command line."""

from graphopt.cli import main

main()
