"""Protocols as programs: what makes the tables in `docs/`."""
