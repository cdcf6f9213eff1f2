"""What things cost in time and memory: `python -m bench.step`."""
