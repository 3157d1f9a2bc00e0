"""Stands between the trainer and a training process; standard library alone.

`python -I -S alveary_shim.py REPORT ORDER PROGRAM GO` beside the trainer: all are descriptors, ORDER and PROGRAM of files.
ORDER holds {group, trainer}; PROGRAM holds {argv, cwd, env} once a byte comes from GO. Everything that takes time (this
interpreter, fork, entering control groups) is done before that byte, so that a trainer can keep a spare shim ready.
`python -I -S alveary_shim.py FOLDER SOCKET` as the first process of a container: the order is FOLDER/order.json, the
report FOLDER/report.json, stdout and stderr the pipes FOLDER/stdout and FOLDER/stderr; SOCKET is the trainer's, and its
end is the trainer's death.

Starts {argv, cwd, env} in a session of its own, in the control groups of the order, and waits. Everything the process
starts ends up below this process, however it detaches: it is a child subreaper (prctl(2), Linux 3.4). When the process
ends, what is left of its tree is killed and {"exit_code"} or {"signal"} is reported; with "problem" where the program
could not be started, and "left" where processes did not die. When the trainer dies, even by kill -9, the kernel sends
this process SIGUSR1 and it kills the tree. SIGTERM asks the process to end, once (alveary_exec.ask); SIGUSR2 is SIGKILL
to all.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import alveary_exec  # type: ignore[import-not-found]

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# How long killed processes may take to be gone, seconds: those in uninterruptible sleep may take for ever.
REAP_SECONDS = 20.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Shim:
    """One order."""

    def __init__(self):
        self.child, self.wanted, self.was_asked = 0, False, False
        self.order = {}
        # Called in the child: waits for the program, and gives its order.
        self.program = lambda: self.order
        # The descriptor that the child waits for.
        self.go = None
        # A thread, started once there is no more to fork.
        self.watch = None

    def ask(self, *_):
        """Once: whoever asks twice is taken for somebody in a hurry by many programs, and they leave without saving."""
        self.wanted = True
        if self.child and not self.was_asked:
            self.was_asked = True
            alveary_exec.ask(self.child)

    def write(self, key, value):
        """Into a file of the control group, where there is one."""
        path = self.order.get("group", {}).get(key)
        if path:
            try:
                with open(path, "w") as file:
                    file.write(value)
            except OSError:
                pass  # removed by the trainer: what was in it is dead

    def kill(self, *_):
        """SIGKILL to all. What is stopped first cannot fork while it is looked for."""
        self.write("no_forks", "0")
        self.write("kill", "1")
        known = set()
        for _round in range(100):
            found = set(alveary_exec.descendants(os.getpid())) - known
            if not found:
                break
            for pid in found:
                send(pid, signal.SIGSTOP)
            known |= found
        for pid in known:
            send(pid, signal.SIGKILL)
        return known

    def reap(self):
        """Kill and collect all that is left; returns what would not die in time."""
        deadline = time.monotonic() + REAP_SECONDS
        while True:
            left = self.kill()
            while True:
                try:
                    if not os.waitpid(-1, os.WNOHANG)[0]:
                        break
                except ChildProcessError:
                    return []
            if time.monotonic() > deadline:
                return sorted(left)
            time.sleep(0.002)

    def abandoned(self, *_):
        """The trainer is gone: nobody may go on in its name."""
        self.reap()
        os._exit(70)

    def start(self):
        """The child, once its program runs; what kept it from running, or None."""
        read, write = os.pipe()  # closed by execve(2)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        child = os.fork()
        if child == 0:
            try:
                for path in self.order.get("group", {}).get("enter", ()):
                    with open(path, "w") as file:
                        file.write("0")
                os.setsid()
                devnull = os.open(os.devnull, os.O_RDONLY)
                os.dup2(devnull, 0)
                alveary_exec.as_found()
                program = self.program()
                alveary_exec.start(program["argv"], program["cwd"], program["env"])
            except alveary_exec.Problem as problem:
                os.write(write, json.dumps([problem.code, str(problem)]).encode())
            except BaseException as error:
                os.write(write, json.dumps([0, f"the process cannot be set up: {error}"]).encode())
            os._exit(alveary_exec.NOT_FOUND)
        self.child = child
        os.close(write)
        if self.go is not None:
            os.close(self.go)  # the trainer learns by its pipe that the child is no more
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self.watch:
            threading.Thread(target=self.watch, daemon=True).start()
        if self.wanted:
            self.ask()
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read()
        return json.loads(said) if said else None


def send(pid, number):
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass  # it ended meanwhile, which is what was wanted; or it is a set-user-id program, which ends with its parents


def beside_the_trainer(libc, shim):
    """Order and report over inherited descriptors."""
    trainer = os.getppid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0)
    descriptor, order, program, go = map(int, sys.argv[1:5])
    for inherited in (descriptor, order, program, go):
        os.set_inheritable(inherited, False)

    def read(file):
        # Its offset is shared with the trainer.
        return json.loads(os.pread(file, os.fstat(file).st_size, 0))

    def wait_for_program():
        if not os.read(go, 1):
            os._exit(0)  # a spare that is not needed
        return read(program)

    shim.order, shim.program, shim.go = read(order), wait_for_program, go
    if os.getppid() != trainer or trainer != shim.order.get("trainer", trainer):
        os._exit(70)  # the trainer died before the kernel was told whom to tell

    def report(text):
        os.write(descriptor, text)

    return report


def in_a_container(shim):
    """Order and report in a folder that the trainer mounted."""
    folder, path = sys.argv[1:3]
    for number, name in ((1, "stdout"), (2, "stderr")):
        pipe = os.open(f"{folder}/{name}", os.O_WRONLY)
        os.dup2(pipe, number)
        os.close(pipe)
    trainer = socket.socket(socket.AF_UNIX)
    trainer.connect(path)

    def watch():
        try:
            while trainer.recv(4096):
                pass
        finally:
            os.kill(os.getpid(), signal.SIGUSR1)

    with open(f"{folder}/order.json", "rb") as file:
        shim.order = json.load(file)
    shim.order["env"] = dict(os.environ) | shim.order["env"]
    if not any(name in shim.order["env"] for name in ("LANG", "LC_ALL", "LC_CTYPE")):
        shim.order["env"]["LANG"] = "C.UTF-8"
    shim.watch = watch

    def report(text):
        with open(f"{folder}/report.json", "ab") as file:
            file.write(text)

    return report


def main():
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    shim = Shim()
    signal.signal(signal.SIGUSR1, shim.abandoned)
    signal.signal(signal.SIGTERM, shim.ask)
    signal.signal(signal.SIGUSR2, shim.kill)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    say = beside_the_trainer(libc, shim) if sys.argv[1].isdigit() else in_a_container(shim)
    problem = shim.start()
    say(json.dumps({"pid": shim.child}).encode() + b"\n")
    report = {}
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            break
        if pid == shim.child:
            report = {"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else {"exit_code": os.WEXITSTATUS(status)}
            break
    if problem is not None:
        report = {"problem": problem[1]}
        if problem[0]:
            report["exit_code"] = problem[0]
    left = shim.reap()
    if left:
        report["left"] = left
    say(json.dumps(report).encode() + b"\n")


main()
