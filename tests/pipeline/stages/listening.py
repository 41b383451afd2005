"""Joins ranks as a stage does and writes the addresses that this rank and its launcher listen on; a program of its own.

python -m torch.distributed.run --nproc_per_node 2 -m tests.pipeline.stages.listening OUT
"""

import ipaddress
import os
import struct
import sys
from pathlib import Path

from pipeline.training.distributed import barrier, init_distributed, sum_across_ranks

LISTENING = "0A"


def addresses(pid: int) -> list[str]:
    """The addresses of every TCP socket that a process listens on, as /proc has them."""
    links = (link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())
    inodes = {str(link).removeprefix("socket:[").rstrip("]") for link in links if str(link).startswith("socket:[")}
    found: list[str] = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                digits = fields[1].partition(":")[0]
                words = [int(digits[start : start + 8], 16) for start in range(0, len(digits), 8)]
                found.append(str(ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))))
    return found


def main() -> None:
    world = init_distributed()
    assert sum_across_ranks([1.0], device=world.device) == [2.0]
    lines = [f"rank {address}" for address in addresses(os.getpid())]
    lines += [f"launcher {address}" for address in addresses(os.getppid())]
    Path(f"{sys.argv[1]}-{world.rank}").write_text("\n".join(lines))
    barrier()


if __name__ == "__main__":
    main()
