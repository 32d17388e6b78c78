"""The op-local audit: recompute every operation from an engine's own recorded inputs and judge its output.

Errors do not accumulate across operations, nothing is compared with another engine, and an operation whose
residual exceeds its bound is wrong by itself.
"""
