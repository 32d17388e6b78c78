"""Speed of two engines, interleaved, on the same tokens, and whether their results are bit-identical."""
