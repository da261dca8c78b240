"""`python -m ghosted_fast`, and so `torchrun -m ghosted_fast`: the same as `ghosted-fast`."""

from ghosted_fast.cli import main

main()
