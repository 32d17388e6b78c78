"""Does the harness work here? Known faults put into the engine's model file or output, which it has to find.

The faults need no compiler, so that an installed wheel can run them, and share no code with
``crossval.diagnose.variants``, from which the harness takes its names.
The zoo of the tests is built on them and adds those that do need one.
"""
