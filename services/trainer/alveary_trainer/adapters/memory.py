"""What processes use, where no control group counts it."""

from __future__ import annotations

from pathlib import Path


def used_bytes(pid: int) -> int:
    """A process's share of the memory that could not be taken back without writing, from /proc/<pid>/smaps_rollup.

    What several processes share counts for each in proportion (PSS), so the sum over a tree counts every page once; clean
    page cache (mapped files: programs, data sets) does not count.

    Raises:
        OSError: it ended.
    """
    try:
        table = _table(Path(f"/proc/{pid}/smaps_rollup"))
    except PermissionError:  # it changed its user: without its shared pages
        table = _table(Path(f"/proc/{pid}/status"))
        return table.get("RssAnon", 0) + table.get("RssShmem", 0) + table.get("VmSwap", 0)
    swapped = table.get("SwapPss", 0)
    if "Pss_Anon" in table:  # Linux 5.4
        return max(table["Pss_Anon"] + table["Pss_Shmem"], table.get("Pss_Dirty", 0)) + swapped
    return max(table.get("Pss", 0) - table.get("Private_Clean", 0), 0) + swapped


def _table(path: Path) -> dict[str, int]:
    found = {}
    for line in path.read_text(errors="replace").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) << 10
    return found
