"""`python -m ctrlray`."""

from ctrlray.cli import main

main(prog_name="ctrlray")
