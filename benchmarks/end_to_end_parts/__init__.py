"""What end_to_end.py measures on a GPU (cuda.py): one module per part, and what they share."""
