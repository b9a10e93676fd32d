"""`python -m ctrlray`."""

from ctrlray.cli import entry

entry()
