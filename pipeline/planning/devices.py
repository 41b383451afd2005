"""How fast a rank's device computes and reads, by name or by its peak, and what shares of that stages reach."""

from pipeline.devices import DEVICES, Device
from pipeline.errors import RecipeError
from pipeline.planning.ranges import Range

# Shares of the peak that PyTorch in eager mode reaches. On two CPU cores the recipe `smol` trained at 0.56 of the
# measured matmul peak; the low ends allow for short batches and for communication between ranks.
TRAINING = Range(low=0.2, expected=0.4, high=0.65)
FORWARD = Range(low=0.15, expected=0.4, high=0.85)
# Many small optimisers share one forward pass.
BLOCK_TRAINING = Range(low=0.1, expected=0.3, high=0.65)
# Shares of the bandwidth at which weights are read while decoding.
DECODING = Range(low=0.1, expected=0.35, high=0.8)
# A peak without a bandwidth: the devices above have 153 to 292 FLOP for each byte they read; two CPU cores on which
# bf16 is slow were measured at 7. With 20 the decoding stages of the logged run of `smol` took what is planned. CPUs
# have peaks below the limit, accelerators above.
ACCELERATOR_FLOPS_PER_BYTE = 250.0
CPU_FLOPS_PER_BYTE = 20.0
LARGEST_CPU_PEAK = 20e12


def find_device(name: str) -> Device:
    """Return a device by name.

    Raises:
        RecipeError: listing the names.
    """
    if name not in DEVICES:
        raise RecipeError(f"no device {name!r}; the devices are {', '.join(DEVICES)}; or give --peak-tflops")
    return DEVICES[name]


def device_of_peak(peak_tflops: float) -> Device:
    """Return a device of which only the peak is given.

    Raises:
        RecipeError: for a peak that is not above 0.
    """
    if not 0 < peak_tflops < 1e6:
        raise RecipeError(f"--peak-tflops is {peak_tflops}; wanted a peak above 0 TFLOP/s")
    peak = peak_tflops * 1e12
    return Device(
        name=f"{peak_tflops:g} TFLOP/s",
        peak_flops_per_s=peak,
        bandwidth_bytes_per_s=peak / (CPU_FLOPS_PER_BYTE if peak < LARGEST_CPU_PEAK else ACCELERATOR_FLOPS_PER_BYTE),
        memory_bytes=None,
    )
