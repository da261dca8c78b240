"""The program behind `make docs`: it writes the tables and the pictures of README and docs.

It reads results (`benchmarks/results`), the command line and the table of families. A table stands
between the markers `<!-- begin: NAME -->` and `<!-- end: NAME -->`; what is outside of them is
written by hand. A second run changes nothing, and a test holds the pages to the program.
"""
