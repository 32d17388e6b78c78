"""Everything the commands do, as functions for programs and notebooks; most return a receipt.

Nothing here reads a command line or prints. Errors are ``crossval.errors.CrossvalError``. A
``model`` is the path of a GGUF file, by default the model that ships with the project. Engines are
given by the words that ``crossval.engines.registry`` lists, or as a directory with a trace.
``progress`` is called with the current activity, the steps done and their total; ``say`` with a line
to show, such as where a file was written.
"""
