"""How much space is too little."""

from __future__ import annotations

from pathlib import Path

import pytest

from alveary_core.disk import Disk, DiskGuard, look, size
from alveary_core.errors import ResourceExhausted

HERE, GIB = Path("/here"), 2**30


@pytest.mark.parametrize(
    ("free", "low", "critical"),
    [(2 * GIB, False, False), (GIB, False, False), (GIB - 1, True, False), (GIB // 2 - 1, True, True), (0, True, True)],
)
def test_a_disk_is_low_below_its_reserve_and_critical_below_half_of_it(free: int, low: bool, critical: bool) -> None:
    disk = Disk(HERE, 100 * GIB, free, GIB)
    assert (disk.low, disk.critical, bool(disk.problem)) == (low, critical, low)


def test_the_reserve_is_the_smaller_of_both_settings(tmp_path: Path) -> None:
    total = look(tmp_path, 1, 0.5).total
    assert look(tmp_path, GIB, 0.5).reserve == min(GIB, total // 2)
    assert look(tmp_path, 10**18, 0.05).reserve == int(total * 0.05)
    assert not look(tmp_path, 0, 0.05).low


def test_a_disk_without_inodes_is_full_whatever_its_bytes() -> None:
    assert Disk(HERE, 100 * GIB, 50 * GIB, GIB, 1_000_000, 5_001).low
    assert Disk(HERE, 100 * GIB, 50 * GIB, GIB, 1_000_000, 4_999).critical
    assert "inodes" in Disk(HERE, 100 * GIB, 50 * GIB, GIB, 1_000_000, 0).problem
    assert not Disk(HERE, 100 * GIB, 50 * GIB, GIB, 0, 0).low, "btrfs has no fixed number of them"
    assert not Disk(HERE, 100 * GIB, 50 * GIB, 0, 1_000, 0).low, "nothing is to be kept free"


def test_the_sentence_stays_the_same_while_the_disk_fills() -> None:
    assert Disk(HERE, 100 * GIB, 3, GIB).problem == Disk(HERE, 100 * GIB, 4, GIB).problem
    assert Disk(HERE, 100 * GIB, 3, GIB).problem == "less than 1.0 GiB of 100.0 GiB are free on the disk of /here"


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1536, 2.5 * 2**40, 5000 * 2**40)] == ["0 bytes", "1023 bytes", "1.5 KiB", "2.5 TiB", "5000.0 TiB"]


async def test_what_needs_space_is_refused_with_a_sentence(tmp_path: Path) -> None:
    await DiskGuard(tmp_path, 1, 0.5).require("this upload is refused")
    # More than there is: as if it were full.
    with pytest.raises(
        ResourceExhausted, match=r"this upload is refused: less than .* are free on the disk of .*ALVEARY_DISK_RESERVE_BYTES"
    ):
        await DiskGuard(tmp_path, 10**18, 1.0).require("this upload is refused")
