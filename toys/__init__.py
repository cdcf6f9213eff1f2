"""Toy models with known answers: `python -m toys tms_5-2`."""
