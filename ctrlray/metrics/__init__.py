"""Statistics of an evaluation: pure functions of arrays. Import from the modules."""
