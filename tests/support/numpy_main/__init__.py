"""The arithmetic of bitnet.cpp's main in NumPy, rounding by rounding; slow, for small models.

Written from docs/numerics.md: what the engine's ``generation="main"`` has to give, bit for bit. It shares no code
with the engine; libm's ``expf``, ``cosf``, ``sinf`` and ``powf`` are those of this machine for both.
"""
