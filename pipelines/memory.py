"""Free memory of this process: that of the machine, and of the control group that a container or a job has."""

import re
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def free_memory() -> int:
    """Returns the bytes of host memory that this process and others may still take: the machine's, or what the limit
    of its control group leaves (version 1 or 2), whichever is less. Page cache counts as free.
    """
    found = re.search(r"MemAvailable:\s+(\d+)", _MEMINFO.read_text())
    assert found is not None, "Linux since 3.14 has it"
    return max(0, min([int(found[1]) * 1024, *_left_in_groups()]))


def _left_in_groups() -> list[int]:
    """Returns what each control group with a limit leaves, this process's own and those above it."""
    left = []
    for line in _read(_OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, limit, usage, cache = _GROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage, cache = (
                _GROUPS / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        inner = root / path.lstrip("/")
        # In a container the path is the host's, and its own group is the root.
        for folder in {inner, *(parent for parent in inner.parents if parent.is_relative_to(root)), root}:
            most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
            if most.isdigit() and used.isdigit():
                freed = re.search(rf"^{cache} (\d+)$", _read(folder / "memory.stat"), flags=re.M)
                left.append(int(most) - int(used) + (int(freed[1]) if freed else 0))
    return left


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no such group, or not for us to see
        return ""
