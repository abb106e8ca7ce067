"""Measurements of conv_pallas: run from a checkout, not installed."""
