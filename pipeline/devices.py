"""How fast devices compute, read and talk to their peers: accelerators by their makers' data sheets. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One rank's device: dense bf16 peak, memory bandwidth, and memory and links where they are known.

    `link_bytes_per_s` is what one device sends to its peers in the node, one direction. Of a measured device peak and
    bandwidth are what was reached, the peak in the precision that was asked for, and `kernel_s` is what a kernel takes
    that has nothing to do.
    """

    name: str
    peak_flops_per_s: float
    bandwidth_bytes_per_s: float
    memory_bytes: float | None
    link_bytes_per_s: float | None = None
    computes_fp8: bool = False
    kernel_s: float | None = None


THIS_MACHINE = "this-machine"
"""In a recipe: the device that the stage finds where it runs, measured."""

# Dense bf16, HBM and NVLink figures of the makers' data sheets, whose link figures count both directions.
DEVICES = {
    device.name: device
    for device in (
        Device(
            name="a100-80gb",
            peak_flops_per_s=312e12,
            bandwidth_bytes_per_s=2.04e12,
            memory_bytes=80 * 2**30,
            link_bytes_per_s=300e9,
        ),
        Device(
            name="h100-80gb",
            peak_flops_per_s=989e12,
            bandwidth_bytes_per_s=3.35e12,
            memory_bytes=80 * 2**30,
            link_bytes_per_s=450e9,
            computes_fp8=True,
        ),
        Device(
            name="h200-141gb",
            peak_flops_per_s=989e12,
            bandwidth_bytes_per_s=4.8e12,
            memory_bytes=141e9,
            link_bytes_per_s=450e9,
            computes_fp8=True,
        ),
        Device(
            name="b200-180gb",
            peak_flops_per_s=2250e12,
            bandwidth_bytes_per_s=7.7e12,
            memory_bytes=180e9,
            link_bytes_per_s=900e9,
            computes_fp8=True,
        ),
    )
}
