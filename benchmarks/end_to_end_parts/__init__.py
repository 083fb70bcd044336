"""What end_to_end_cuda.py measures: one module per part, and what they share in bench.py."""
