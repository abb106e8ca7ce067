"""A package by name, or an installed one called `tests` would be taken for these."""

import benchmarks  # noqa: F401 - which finds the kernels where nothing is installed
