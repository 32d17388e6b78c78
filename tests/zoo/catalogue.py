"""Every fault and every place to try it."""

from __future__ import annotations

from tests.zoo.fault import Case, EngineFault, Fault
from tests.zoo.faults import attention, bitlinear, files, llama, rest, traces

ENGINE_FAULTS: tuple[EngineFault, ...] = (*bitlinear.FAULTS, *attention.FAULTS, *rest.FAULTS)
FAULTS: tuple[Fault, ...] = (*ENGINE_FAULTS, *files.FAULTS, *traces.FAULTS)
CASES: tuple[Case, ...] = tuple(case for fault in FAULTS for case in fault.cases())
OF_LLAMA: tuple[Fault, ...] = llama.OWN
"""What only a llama model can get wrong."""
ON_LLAMA: tuple[Fault, ...] = (*OF_LLAMA, *llama.on_llama(FAULTS))
"""Every fault that a llama model can have."""
