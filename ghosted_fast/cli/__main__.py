"""`python -m ghosted_fast.cli`: the same as the script `ghosted-fast`."""

from ghosted_fast.cli import main

main()
