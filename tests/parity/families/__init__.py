"""Families of cases, one module each; the runner finds them by itself.

A module has `claims(case) -> bool`, which looks at the json and nothing else, and `run(case, report)`, which records
comparisons in the `Report` and raises `Unsupported` for what it cannot run.
"""
