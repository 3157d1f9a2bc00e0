"""What cannot be executed is named, with what is wrong and what to do; what a shell would run runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alveary_trainer.adapters.alveary_exec import Problem, runnable
from alveary_trainer.adapters.process import ProcessTree, become_subreaper
from alveary_trainer.adapters.runtime import Outcome


def written(folder: Path, name: str, content: bytes, mode: int = 0o755) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    return path


async def run(argv: list[str], cwd: Path, env: dict[str, str] | None = None) -> tuple[Outcome, str]:
    become_subreaper()
    tree = ProcessTree.launch(argv, cwd, {"PATH": os.environ["PATH"]} | (env or {}))
    outcome = await tree.wait()
    with os.fdopen(tree.stdout, "rb") as out, os.fdopen(tree.stderr, "rb") as err:
        return outcome, (out.read() or b"").decode() + (err.read() or b"").decode()


@pytest.mark.parametrize(
    ("argv", "content"),
    [
        (["./run.sh", "x y"], b'#!/bin/sh\necho "ran $1"\n'),
        (["./sub folder/run it.sh", "x y"], b'#!/usr/bin/env -S bash -e\necho "ran $1"\n'),
        (["./run.sh", "x y"], b'echo "ran $1"\n'),
        (["./run", "x y"], b"#!/usr/bin/env python3\nimport sys\nprint('ran', sys.argv[1])\n"),
        (["./run", "x y"], b"#! /usr/bin/env python3\n\xef\xbb\xbf"[:23] + b"\nimport sys\nprint('ran', sys.argv[1])\n"),
        (["bash", "run.sh", "x y"], b'echo "ran $1"\n'),
        (["sh", "-c", "echo ran x y"], b""),
    ],
    ids=["shebang", "spaces", "no-shebang", "python", "space-after", "given-to-a-shell", "a-line"],
)
async def test_what_a_shell_would_run_runs(tmp_path: Path, argv: list[str], content: bytes) -> None:
    file = argv[0] if "/" in argv[0] else argv[1]
    written(tmp_path, file.removeprefix("./") if not file.startswith("-") else "unused", content)
    outcome, said = await run(argv, tmp_path)
    assert (outcome.exit_code, said) == (0, "ran x y\n"), (outcome, said)


ELF = bytearray(Path(sys.executable).resolve().read_bytes()[:64])
ELF[18:20] = (0x16).to_bytes(2, "little")


@pytest.mark.parametrize(
    ("argv", "files", "code", "words"),
    [
        (["./run.sh"], {}, 127, ["./run.sh", "no such file", "source directory"]),
        (["./Run.sh"], {"run.sh": b""}, 127, ["./Run.sh", "did you mean run.sh"]),
        (["./train"], {"train.py": b""}, 127, ["./train", "did you mean train.py"]),
        (["run.sh"], {"run.sh": b"#!/bin/sh\n"}, 127, ["run.sh", "not on the PATH", "write ./run.sh"]),
        (["no-such-thing"], {}, 127, ["'no-such-thing'", "neither in the environment nor on this node"]),
        (["./sub"], {"sub/x": b""}, 126, ["./sub", "folder"]),
        (["./file/x"], {"file": b""}, 127, ["./file/x", "not a folder"]),
        (["./run.sh"], {"run.sh": (b"#!/bin/bash\n", 0o644)}, 126, ["./run.sh is not executable", "0644", "chmod +x ./run.sh", "bash ./run.sh"]),
        (["./t.py"], {"t.py": (b"import x\n", 0o644)}, 126, ["chmod +x ./t.py", "'python ./t.py'"]),
        (["./run.sh"], {"run.sh": b"#!/bin/bash\r\necho x\r\n"}, 126, ["./run.sh", "Windows line endings", "dos2unix ./run.sh", "eol=lf"]),
        (["./run.sh"], {"run.sh": b"#!/usr/bin/env bash\r\necho x\r\n"}, 126, ["Windows line endings"]),
        (["./run.sh"], {"run.sh": b"echo x\r\n"}, 126, ["Windows line endings"]),
        (["bash", "run.sh"], {"run.sh": b"set -e\r\necho x\r\n"}, 126, ["run.sh", "Windows line endings"]),
        (["sh", "-eu", "run.sh"], {"run.sh": b"\xff\xfes\0h\0"}, 126, ["run.sh", "UTF-16"]),
        (["./run.sh"], {"run.sh": b"\xef\xbb\xbf#!/bin/sh\necho x\n"}, 126, ["byte order mark", "without BOM"]),
        (["./run.sh"], {"run.sh": b"\xff\xfe#\0!\0"}, 126, ["UTF-16"]),
        (["./run.sh"], {"run.sh": b"#!/opt/python9/bin/python\n"}, 126, ["./run.sh", "/opt/python9/bin/python", "not here"]),
        (["./run.sh"], {"run.sh": b"#!/usr/bin/env pythonn\n"}, 126, ["pythonn", "no folder of PATH"]),
        (["./run.sh"], {"run.sh": b"#!/usr/bin/env python -u\n"}, 126, ["env -S"]),
        (["./run.sh"], {"run.sh": b"#!\necho\n"}, 126, ["names no interpreter"]),
        (["./run.sh"], {"run.sh": b"#!" + b"/x" * 200 + b"\n"}, 126, ["402 bytes"]),
        (["./run.sh"], {"run.sh": b"!/usr/bin/env bash\necho\n"}, 126, ["first two bytes must be '#!'"]),
        (["./run.sh"], {"run.sh": b"\n#!/bin/bash\necho\n"}, 126, ["first two bytes must be '#!'"]),
        (["./t.py"], {"t.py": b"import os\n"}, 126, ["t.py has no '#!' line", "python ./t.py"]),
        (["./prog"], {"prog": bytes(ELF)}, 126, ["program for s390", "this node is"]),
        (["./prog.exe"], {"prog.exe": b"MZ\x90\0"}, 126, ["program for Windows"]),
        (["./prog"], {"prog": b"\xcf\xfa\xed\xfe\0"}, 126, ["program for macOS"]),
        (["./prog"], {"prog": b"\x80\0\x01"}, 126, ["neither a program for Linux nor a script"]),
        ([""], {}, 127, ["empty"]),
    ],
)  # fmt: skip
async def test_what_cannot_run_is_named(
    tmp_path: Path, argv: list[str], files: dict[str, bytes | tuple[bytes, int]], code: int, words: list[str]
) -> None:
    for name, content in files.items():
        written(tmp_path, name, *(content if isinstance(content, tuple) else (content,)))
    with pytest.raises(Problem) as refused:
        runnable(argv, str(tmp_path), os.environ["PATH"])
    assert refused.value.code == code
    for word in words:
        assert word in str(refused.value)


async def test_a_link_that_leads_nowhere_and_one_that_leads_to_a_program(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(Problem, match="symbolic link to nowhere"):
        runnable(["./gone"], str(tmp_path), "")
    true = shutil.which("true")
    assert true is not None
    (tmp_path / "there").symlink_to(true)
    assert (await run(["./there"], tmp_path))[0].exit_code == 0


async def test_what_execve_refuses_is_told_by_name(tmp_path: Path) -> None:
    outcome, _ = await run(["true", "x" * 200_000], tmp_path)
    assert outcome.exit_code == 126 and "argument 1 with 200000 bytes" in outcome.problem
    outcome, _ = await run(["true"], tmp_path, {"HUGE": "x" * 200_000})
    assert "the variable HUGE" in outcome.problem
    image = bytearray(Path("/bin/true").resolve().read_bytes())
    at = image.find(b"/lib64/ld-")
    if at < 0:
        pytest.skip("this machine's programs have another loader")
    image[at : at + 10] = b"/lib64/xx-"
    written(tmp_path, "foreign", bytes(image))
    outcome, _ = await run(["./foreign"], tmp_path)
    assert outcome.exit_code == 127 and "needs a program loader that is not here" in outcome.problem


async def test_no_working_directory_is_told(tmp_path: Path) -> None:
    outcome, _ = await run(["true"], tmp_path / "nowhere")
    assert outcome.exit_code == 126 and f"the working directory {tmp_path}/nowhere: No such file" in outcome.problem


@pytest.mark.skipif(os.getuid() != 0, reason="only root mounts")
async def test_a_mount_without_programs_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        written(folder, "run.sh", b"#!/bin/sh\n")
        outcome, _ = await run(["./run.sh"], folder)
        assert outcome.exit_code == 126 and "noexec" in outcome.problem
    finally:
        subprocess.run(["umount", str(folder)], check=True)
