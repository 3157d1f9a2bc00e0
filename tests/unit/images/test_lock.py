"""Locks: what was built from source is pinned by its wheel."""

from __future__ import annotations

from alveary_images.adapters.resolve import _PIN, _REFERENCE, _pinned

LOCK = """\
docopt==0.6.2 \\
    --hash=sha256:aaa \\
    --hash=sha256:bbb
docopt-extra==1.0 \\
    --hash=sha256:ccc
slow @ file:///x/slow-1.0.tar.gz \\
    --hash=sha256:ddd
win==1 ; sys_platform == 'linux' \\
    --hash=sha256:eee
git-pkg @ git+https://example.org/x@abc
"""


def test_a_source_package_gets_the_hash_of_its_wheel_and_no_other_changes() -> None:
    done = _pinned(LOCK, {"name": "docopt", "version": "0.6.2", "sha256": "111"})
    assert "docopt==0.6.2 \\\n    --hash=sha256:111\n" in done and "aaa" not in done and "bbb" not in done
    assert "docopt-extra==1.0 \\\n    --hash=sha256:ccc" in done


def test_a_direct_reference_becomes_a_pin() -> None:
    assert dict(_REFERENCE.findall(LOCK)) == {"slow": "file:///x/slow-1.0.tar.gz", "git-pkg": "git+https://example.org/x@abc"}
    done = _pinned(LOCK, {"name": "slow", "version": "1.0", "sha256": "222"})
    done = _pinned(done, {"name": "git-pkg", "version": "3", "sha256": "333"})
    assert "slow==1.0 \\\n    --hash=sha256:222\n" in done and "git-pkg==3 \\\n    --hash=sha256:333\n" in done
    assert not _REFERENCE.findall(done)
    assert len(_PIN.findall(done)) == 5


def test_a_marker_stays() -> None:
    done = _pinned(LOCK, {"name": "win", "version": "1", "sha256": "444"})
    assert "win==1 ; sys_platform == 'linux' \\\n    --hash=sha256:444\n" in done
