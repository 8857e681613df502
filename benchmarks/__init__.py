"""Time and peak memory of every operation, its peers measured side by side; `python -m benchmarks --help`."""
