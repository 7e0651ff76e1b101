"""`python -m expertd`: the same as the `expertd` command."""

from expertd.cli import main

main()
