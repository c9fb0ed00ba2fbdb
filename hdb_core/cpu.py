"""What this CPU is good at."""

import torch


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 is multiplied in hardware, at least twice as fast as float32; emulated, it is slower than that."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
