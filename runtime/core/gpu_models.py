"""GPUs that people have: how much memory, how fast it is read, and the link over which the host's memory is read.

Sources: memory of cards as nvidia-smi shows it, which is less than on the box where error correction takes a part; of
devices that share their memory with the host, and bandwidths, NVIDIA's data sheets. A link is PCI Express with 16
lanes, in one direction, its encoding taken off.
"""

from dataclasses import dataclass

_MIB = 1 << 20
_PCIE3, _PCIE4, _PCIE5 = 15_750_000_000, 31_500_000_000, 63_000_000_000


@dataclass(frozen=True)
class GpuModel:
    """sm: 89 for compute capability 8.9. memory: bytes. bandwidth: bytes per second that it is read with, at most.

    link: bytes per second from the host's memory, at most; 0 where that is the GPU's own.
    """

    name: str
    sm: int
    memory: int
    bandwidth: int
    link: int


GPU_MODELS = (
    GpuModel("T4", 75, 15360 * _MIB, 320_000_000_000, _PCIE3),
    GpuModel("A30", 80, 24576 * _MIB, 933_000_000_000, _PCIE4),
    GpuModel("A100 40GB", 80, 40960 * _MIB, 1_555_000_000_000, _PCIE4),
    GpuModel("A100 80GB", 80, 81920 * _MIB, 2_039_000_000_000, _PCIE4),
    GpuModel("RTX 3090", 86, 24576 * _MIB, 936_000_000_000, _PCIE4),
    GpuModel("A10", 86, 23028 * _MIB, 600_000_000_000, _PCIE4),
    GpuModel("A40", 86, 46068 * _MIB, 696_000_000_000, _PCIE4),
    GpuModel("RTX A6000", 86, 49140 * _MIB, 768_000_000_000, _PCIE4),
    GpuModel("Jetson AGX Orin 64GB", 87, 64_000_000_000, 204_800_000_000, 0),
    GpuModel("L4", 89, 23034 * _MIB, 300_000_000_000, _PCIE4),
    GpuModel("RTX 4090", 89, 24564 * _MIB, 1_008_000_000_000, _PCIE4),
    GpuModel("L40S", 89, 46068 * _MIB, 864_000_000_000, _PCIE4),
    GpuModel("RTX 6000 Ada", 89, 49140 * _MIB, 960_000_000_000, _PCIE4),
    GpuModel("H100", 90, 81559 * _MIB, 3_350_000_000_000, _PCIE5),
    GpuModel("H200", 90, 143771 * _MIB, 4_800_000_000_000, _PCIE5),
    GpuModel("B200", 100, 183359 * _MIB, 8_000_000_000_000, _PCIE5),
    GpuModel("Jetson Thor", 110, 128_000_000_000, 273_000_000_000, 0),
    GpuModel("RTX 5090", 120, 32607 * _MIB, 1_792_000_000_000, _PCIE5),
    GpuModel("RTX PRO 6000", 120, 97887 * _MIB, 1_792_000_000_000, _PCIE5),
    GpuModel("DGX Spark", 121, 128_000_000_000, 273_000_000_000, 0),
)
