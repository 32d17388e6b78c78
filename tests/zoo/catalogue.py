"""Every fault and every place to try it."""

from __future__ import annotations

from collections.abc import Mapping

from tests.zoo.fault import Case, EngineFault, Fault
from tests.zoo.faults import attention, bitlinear, bitnet, files, llama, rest, traces

ENGINE_FAULTS: tuple[EngineFault, ...] = (*bitlinear.FAULTS, *attention.FAULTS, *rest.FAULTS)
FAULTS: tuple[Fault, ...] = (*ENGINE_FAULTS, *files.FAULTS, *traces.FAULTS)
CASES: tuple[Case, ...] = tuple(case for fault in FAULTS for case in fault.cases())
OF: Mapping[str, tuple[Fault, ...]] = {"llama": llama.OWN, "bitnet": bitnet.OWN}
"""Architecture -> what its models alone can get wrong."""
ON: Mapping[str, tuple[Fault, ...]] = {
    "llama": (*llama.OWN, *llama.on_llama(FAULTS)),
    "bitnet": (*bitnet.OWN, *bitnet.on_bitnet(FAULTS)),
}
"""Architecture -> every fault that its models can have."""
