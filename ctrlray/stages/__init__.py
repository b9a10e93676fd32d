"""Pipeline stages: table in, table out."""
