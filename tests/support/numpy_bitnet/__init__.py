"""A third-party engine: BitNet b1.58 in NumPy, in many healthy arithmetics, or with one bug.

It takes no formula from ``crossval`` or ``bitnet_py``: what it shares with the harness is the names of the tensors
and the format of a recording. ``engine`` is the forward pass, ``styles`` are right arithmetics, ``mistakes`` are
what coarse traces have hidden.
"""
