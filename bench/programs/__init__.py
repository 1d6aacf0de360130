"""qe-edge's own measurements: `python -m qe_edge.bench.programs.NAME --help`."""
