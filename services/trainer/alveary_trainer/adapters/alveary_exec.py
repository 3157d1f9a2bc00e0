"""What the shim and the ranks share: finding a program as a shell would, saying why it cannot run, asking it to end.

Standard library alone: it is copied beside them, and runs with whatever python an environment has.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import struct

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # what a shell ends with
SHELLS = {"sh", "ash", "bash", "busybox", "csh", "dash", "fish", "ksh", "mksh", "rbash", "tcsh", "yash", "zsh"}
# Programs that start another one and die of a SIGTERM without passing it on.
WRAPPERS = {"accelerate", "conda", "hatch", "mamba", "micromamba", "pdm", "pipenv", "poetry", "script", "strace", "time"}
MACHINES = {3: "x86 (32 bits)", 40: "arm (32 bits)", 62: "x86_64", 183: "aarch64", 21: "ppc64", 22: "s390", 243: "riscv"}
OPEN_FILES = 65536  # DataLoader workers pass tensors as descriptors; select(2) needs less only where more are open
OOM_SCORE = 500  # where memory runs out, a run ends before the platform does
SHEBANG = 255  # linux/binfmts.h BINPRM_BUF_SIZE


class Problem(Exception):
    """The program cannot run: `code` is the exit code of a shell, the text says what is wrong and what to do."""

    def __init__(self, code: int, text: str) -> None:
        Exception.__init__(self, text)
        self.code = code


def runnable(argv: list[str], cwd: str, path: str) -> tuple[str, list[str]]:
    """What to execute for `argv`, started in `cwd` with PATH `path`: (file, argv).

    Raises:
        Problem: there is none, or it cannot run.
    """
    word = argv[0]
    if not word:
        raise Problem(NOT_FOUND, "the command is empty")
    file = os.path.join(cwd, word) if "/" in word else _on_path(word, cwd, path)
    head = _checked(word, file)
    if head[:2] == b"#!":
        _check_interpreter(word, head, cwd, path)
    elif head[:4] == b"\x7fELF":
        _check_machine(word, head)
    else:
        _check_text(word, head)
        # As a shell does, and execvp(3): what is text and says nothing else is a script for sh.
        return "/bin/sh", ["/bin/sh", file, *argv[1:]]
    if os.path.basename(file) in SHELLS:
        _check_script_of(argv, cwd)
    return file, argv


def _on_path(word: str, cwd: str, path: str) -> str:
    seen = None
    for folder in path.split(":"):
        file = os.path.join(cwd, folder, word)
        if os.path.isfile(file):
            if os.access(file, os.X_OK):
                return file
            seen = seen or file
    text = f"command {word!r} is neither in the environment nor on this node: no folder of PATH has it"
    if os.path.isfile(os.path.join(cwd, word)):
        text = f"command {word!r} is not on the PATH; the source has a file of that name: write ./{word}"
    elif seen:
        text = f"command {word!r} is not executable: {seen} has mode {stat.S_IMODE(os.stat(seen).st_mode):04o}"
    raise Problem(NOT_FOUND, text)


def _checked(word: str, file: str) -> bytes:
    """The beginning of a file that may be executed."""
    try:
        mode = os.stat(file).st_mode
    except OSError as error:
        if os.path.islink(file):
            raise Problem(NOT_FOUND, f"{word} is a symbolic link to {os.readlink(file)}, which is not there")
        if error.errno == errno.ENOTDIR:
            raise Problem(NOT_FOUND, f"{word}: a part of this path is a file, not a folder")
        folder, name = os.path.split(file)
        try:
            similar = sorted(n for n in os.listdir(folder) if n.lower() == name.lower() or os.path.splitext(n)[0] == name)
        except OSError:
            similar = []
        hint = f"; did you mean {similar[0]}?" if similar else ": the path is relative to the source directory"
        raise Problem(NOT_FOUND, f"{word}: there is no such file{hint}")
    if stat.S_ISDIR(mode):
        raise Problem(NOT_EXECUTABLE, f"{word} is a folder, not a program")
    if not stat.S_ISREG(mode):
        raise Problem(NOT_EXECUTABLE, f"{word} is not a regular file")
    try:
        with open(file, "rb") as opened:
            head = opened.read(4096)
    except OSError:
        head = b"\x7fELF" if os.access(file, os.X_OK) else b""  # programs need not be readable
    if not os.access(file, os.X_OK):
        if mode & 0o111:
            raise Problem(NOT_EXECUTABLE, _forbidden(word, file, mode))
        raise Problem(
            NOT_EXECUTABLE,
            "{} is not executable (mode {:04o}): run `chmod +x {}` before submitting, or start it as {!r}".format(
                word, stat.S_IMODE(mode), word, f"{_interpreter_for(word, head)} {word}"
            ),
        )
    return head


def _interpreter_for(word: str, head: bytes) -> str:
    if word.endswith(".py"):
        return "python"
    first = head.split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    words = first[2:].split() if first.startswith("#!") else []
    names = [os.path.basename(w) for w in words if not w.startswith("-") and os.path.basename(w) != "env"]
    return names[0] if names else "sh"


def _check_interpreter(word: str, head: bytes, cwd: str, path: str) -> None:
    line, _end, _ = head.partition(b"\n")
    if len(line) > SHEBANG:
        raise Problem(NOT_EXECUTABLE, f"{word}: its first line has {len(line)} bytes, and the kernel takes {SHEBANG}")
    if line.endswith(b"\r"):
        raise Problem(NOT_EXECUTABLE, _windows(word))
    words = line[2:].decode("utf-8", "surrogateescape").split()
    if not words:
        raise Problem(NOT_EXECUTABLE, f"{word}: its first line, '#!', names no interpreter")
    interpreter = os.path.join(cwd, words[0])
    if not os.path.exists(interpreter):
        raise Problem(NOT_EXECUTABLE, f"{word}: its first line asks for {words[0]}, which is not here")
    if not os.access(interpreter, os.X_OK) or os.path.isdir(interpreter):
        raise Problem(NOT_EXECUTABLE, f"{word}: its first line asks for {words[0]}, which is not executable")
    if os.path.basename(words[0]) == "env":
        wanted = [w for w in words[1:] if not w.startswith("-") and "=" not in w]
        if not wanted:
            return
        if len(words) > 2 and not words[1].startswith("-"):
            raise Problem(
                NOT_EXECUTABLE,
                "{}: its first line gives env one word, {!r}: with arguments it must say env -S".format(word, " ".join(words[1:])),
            )
        if "/" not in wanted[0] and not any(os.access(os.path.join(cwd, folder, wanted[0]), os.X_OK) for folder in path.split(":")):
            raise Problem(NOT_EXECUTABLE, f"{word}: its first line asks for {wanted[0]}, and no folder of PATH has it")


def _check_machine(word: str, head: bytes) -> None:
    if len(head) < 20:
        return  # not readable
    (machine,) = struct.unpack(("<" if head[5] == 1 else ">") + "H", head[18:20])
    with open("/proc/self/exe", "rb") as own:
        mine = own.read(20)
    (ours,) = struct.unpack(("<" if mine[5] == 1 else ">") + "H", mine[18:20])
    if machine != ours and not (ours == 62 and machine == 3):
        names = [MACHINES.get(m, f"machine {m}") for m in (machine, ours)]
        raise Problem(NOT_EXECUTABLE, "{} is a program for {}, and this node is {}".format(word, *names))


def _check_text(word: str, head: bytes) -> None:
    """Of a file without "#!" that is about to be given to sh."""
    if head.startswith(b"\xef\xbb\xbf"):
        raise Problem(NOT_EXECUTABLE, f"{word} begins with a byte order mark, so its '#!' is not seen: save it as UTF-8 without BOM")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Problem(NOT_EXECUTABLE, f"{word} is UTF-16 text: save it as UTF-8 without BOM")
    if head.lstrip()[:2] in (b"!/", b"#!") or head[:2] == b"#/":
        raise Problem(NOT_EXECUTABLE, f"{word}: its first two bytes must be '#!', and are {head[:2].decode('utf-8', 'replace')!r}")
    kinds = {b"MZ": "Windows", b"\xcf\xfa\xed\xfe": "macOS", b"\xca\xfe\xba\xbe": "macOS"}
    for magic, system in kinds.items():
        if head.startswith(magic):
            raise Problem(NOT_EXECUTABLE, f"{word} is a program for {system}, and this node runs Linux")
    if b"\0" in head:
        raise Problem(NOT_EXECUTABLE, f"{word} is neither a program for Linux nor a script")
    if word.endswith(".py"):
        raise Problem(
            NOT_EXECUTABLE,
            f"{word} has no '#!' line: begin it with #!/usr/bin/env python, or start it as 'python {word}'",
        )
    if head.split(b"\n", 1)[0].endswith(b"\r"):
        raise Problem(NOT_EXECUTABLE, _windows(word))


def _check_script_of(argv: list[str], cwd: str) -> None:
    """Of a script that a shell is given: `bash run.sh`."""
    for word in argv[1:]:
        if word.startswith("-"):
            if "c" in word:
                return
            continue
        try:
            with open(os.path.join(cwd, word), "rb") as file:
                head = file.read(4096)
        except OSError:
            return  # the shell will say so
        if head.split(b"\n", 1)[0].endswith(b"\r"):
            raise Problem(NOT_EXECUTABLE, _windows(word))
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise Problem(NOT_EXECUTABLE, f"{word} is UTF-16 text: save it as UTF-8 without BOM")
        return


def _windows(word: str) -> str:
    return (
        f"{word} has Windows line endings (CRLF), which shells and the kernel take for part of the words: convert it with "
        f"`dos2unix {word}` or `sed -i 's/\\r$//' {word}`, and put `*.sh text eol=lf` into .gitattributes"
    )


def _forbidden(word: str, file: str, mode: int) -> str:
    return f"{word} may not be executed (mode {stat.S_IMODE(mode):04o}): it is another user's, or {file} is on a file system mounted noexec"


def refusal(error: OSError, file: str, argv: list[str], env: dict[str, str]) -> Problem:
    """Why execve(2) refused what `runnable` let pass: a Problem."""
    word = argv[0]
    if error.errno == errno.E2BIG:
        sizes = [(len(os.fsencode(a)), f"argument {n}") for n, a in enumerate(argv)]
        sizes += [(len(os.fsencode(k)) + len(os.fsencode(v)) + 1, f"the variable {k}") for k, v in env.items()]
        longest, name = max(sizes)
        return Problem(
            NOT_EXECUTABLE,
            f"{word}: its arguments and environment have {sum(s for s, _ in sizes)} bytes, more than the kernel takes; the longest is {name} with {longest} bytes, "
            "where one may have 131071: put it into a file of the source",
        )
    if error.errno == errno.ENOENT:
        return Problem(NOT_FOUND, f"{word} needs a program loader that is not here: it was built for another distribution")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Problem(NOT_EXECUTABLE, _forbidden(word, file, os.stat(file).st_mode))
    return Problem(NOT_EXECUTABLE, f"{word} cannot be started: {error.strerror}")


def as_found() -> None:
    """Give the process what a program expects, whoever started the platform: called between fork and exec."""
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_DFL)
        except (OSError, ValueError):
            continue  # SIGKILL, SIGSTOP, and those of the C library
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.umask(0o022)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        with open("/proc/self/oom_score_adj", "r+") as file:
            if int(file.read()) < OOM_SCORE:
                file.write(str(OOM_SCORE))
    except OSError:
        pass  # a kernel or a container without it: then all are equal


def start(argv: list[str], cwd: str, env: dict[str, str]) -> None:
    """Become the program, in a forked child: does not return. Raises Problem."""
    try:
        os.chdir(cwd)
    except OSError as error:
        raise Problem(NOT_EXECUTABLE, f"the working directory {cwd}: {error.strerror}")
    file, argv = runnable(argv, cwd, env.get("PATH", os.defpath))
    try:
        os.execve(file, argv, env)
    except OSError as error:
        raise refusal(error, file, argv, env)


def parents() -> dict[int, list[int]]:
    """Children by parent, of all processes."""
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            found.setdefault(int(fields[1]), []).append(int(name))
    return found


def descendants(root: int) -> list[int]:
    """Pids below `root`; children after their parents."""
    children, todo = parents(), [root]
    found: list[int] = []
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _status(pid: int) -> dict[str, str]:
    """/proc/<pid>/status; empty once it is gone."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return {name: value for name, _, value in (line.partition(":") for line in file)}
    except OSError:
        return {}


def _catches(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    return bool(int(_status(pid).get("SigCgt", "0"), 16) & 1 << (signal.SIGTERM - 1))


def _passes_nothing_on(pid: int) -> bool:
    """Whether it is a shell, or another program that dies of SIGTERM and leaves its child alone."""
    try:
        with open(f"/proc/{pid}/comm") as file:
            name = file.read().strip()
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")) in SHELLS or name in WRAPPERS
    except OSError:
        return False


def asked(pid: int) -> list[int]:
    """Who is to be asked to end, of `pid` and what it started.

    Itself, as with `kill`. But a shell (or a wrapper) that has no trap dies at once and leaves its program no time: so
    where one of the programs below it has a handler, those are asked, and the shell goes on when they have ended.
    """
    children = parents()

    def handlers(one: int) -> list[int]:
        if _catches(one):
            return [one]
        return [h for child in children.get(one, []) for h in handlers(child)]

    if _catches(pid) or not _passes_nothing_on(pid):
        return [pid]
    return handlers(pid) or [pid]


def ask(pid: int) -> None:
    """SIGTERM to `asked(pid)`, once; what is stopped is woken, so that it can answer."""
    for one in asked(pid):
        try:
            os.kill(one, signal.SIGTERM)
            if _status(one).get("State", "").strip().startswith("T"):
                os.kill(one, signal.SIGCONT)
        except (ProcessLookupError, PermissionError):
            continue  # it ended by itself; or it is a set-user-id program, which goes with the rest
