"""Fuzzing (docs/reliability.md): what reads files from outside, on bytes made to break it.

``targets`` is the table, ``seeds`` what every search begins with, ``crashers`` the smallest inputs that ever broke
one. ``python -m tests.fuzz`` (`make fuzz`) searches; `make test` runs every target over its seeds and crashers.
"""
