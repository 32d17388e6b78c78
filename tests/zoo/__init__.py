"""The zoo: ways real BitNet engines have gone wrong, injected into a running engine, a model file or a trace.

A fault here breaks something and says where the harness has to find it. It shares no code with the variants that
the harness explains a finding with.
"""
