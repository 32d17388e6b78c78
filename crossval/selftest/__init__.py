"""Does the harness work here? It has to find known faults, injected into the engine's model file or output.

The faults need no compiler, so that an installed wheel can run them, and share no code with
``crossval.diagnose.variants``, from which the harness takes its names.
The zoo of the tests is built on them and adds faults that do need a compiler.
"""
