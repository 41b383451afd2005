"""Accelerators by their makers' data sheets: how fast each computes, reads and talks to its peers. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One rank's device: dense bf16 peak, memory bandwidth, and memory and links where they are known.

    `link_bytes_per_s` is what one device sends to its peers in the node, one direction.
    """

    name: str
    peak_flops_per_s: float
    bandwidth_bytes_per_s: float
    memory_bytes: float | None
    link_bytes_per_s: float | None = None
    computes_fp8: bool = False


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
