"""Sweeps: one comparison per model, prompt, candidate and kernel family, in processes of their own, resumable."""
