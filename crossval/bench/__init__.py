"""Speed of two engines, interleaved, on the same tokens, and whether they computed the same meanwhile."""
