"""The zone whose nights the schedule means: TZ, or the machine's own, or UTC where neither has a name.

Dagster takes the hours of a schedule for UTC unless it is given a zone by its name in the IANA database.
"""

import os
import warnings
import zoneinfo
from pathlib import Path

LOCALTIME = Path("/etc/localtime")  # a link into the database on Linux and macOS; absent, or a copy, in many containers
_DATABASE = "zoneinfo/"


def find_time_zone(*, localtime: Path = LOCALTIME) -> str:
    """Return the name of the zone, as in Europe/Berlin."""
    asked = os.environ.get("TZ", "").removeprefix(":")
    if asked and _is_zone(asked):
        return asked
    target = str(localtime.readlink()) if localtime.is_symlink() else ""
    _, found, name = target.rpartition(_DATABASE)
    zone = name if found and _is_zone(name) else "UTC"
    if asked:
        warnings.warn(
            f"TZ is {asked!r}, no zone of the IANA database as Europe/Berlin is: the nightly schedule runs in {zone}",
            stacklevel=2,
        )
    return zone


def _is_zone(name: str) -> bool:
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):  # OSError: a folder of the database, as Europe is
        return False
    return True
