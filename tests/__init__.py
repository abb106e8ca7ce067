"""A package by name, or an installed one called `tests` would be taken for these."""
