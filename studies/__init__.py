"""One script for each result of the paper; each reads finished runs: `python -m studies.report out/vpd-stdlib`."""
