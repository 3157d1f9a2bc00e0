"""Stands between a launcher (torchrun, mpirun) and one rank; standard library alone: `python -I -S alveary_rank.py`.

Tells the trainer, over $ALVEARY_RANKS/ranks.sock, which rank this is, and hands it the read ends of the rank's stdout and
stderr; starts what $ALVEARY_RANKS/rank.json says; reports how it ended, and ends the same way. The launcher's SIGTERM is
passed on, and its SIGKILL reaches the rank through the kernel (prctl(2) PR_SET_PDEATHSIG).

When the run is to end, it is the trainer that asks ("stop"), and not the launcher: torchrun kills after 30 s what it was
told to end, Open MPI after one, whatever the run's grace is. The rank gets one SIGTERM, whoever asks. Then this process
ends with 0, however the rank ended: a launcher that sees a failure would end the other ranks, or start this one anew.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import signal
import socket
import sys
import threading

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import alveary_exec  # type: ignore[import-not-found]

PR_SET_PDEATHSIG = 1
NAMES = {  # of torchrun, of Open MPI
    "rank": ("RANK", "OMPI_COMM_WORLD_RANK"),
    "local_rank": ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "world_size": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"),
    "local_world_size": ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
}
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Rank:
    """The program of this rank."""

    def __init__(self, child: int) -> None:
        self.child, self.lock = child, threading.Lock()
        # Somebody asked for its end; the trainer did.
        self.asked = self.stopping = False

    def ask(self) -> None:
        """SIGTERM, once."""
        with self.lock:
            first, self.asked = not self.asked, True
        if first:
            alveary_exec.ask(self.child)

    def passed_on(self, number: int, _: object) -> None:
        """What the launcher sends."""
        if number == signal.SIGTERM:
            # A thread of its own: the handler may have interrupted the one that holds the lock.
            threading.Thread(target=self.ask, daemon=True).start()
            return
        self.asked = self.asked or number in ENDING
        try:
            os.kill(self.child, number)
        except ProcessLookupError:
            pass  # it has ended by itself


def main() -> None:
    me = {key: next((int(os.environ[n]) for n in names if n in os.environ), 0) for key, names in NAMES.items()}
    for key, (name, _) in NAMES.items():
        os.environ.setdefault(name, str(me[key]))  # so that torch.distributed finds its way under mpirun too
    me["restarts"] = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    folder = os.environ["ALVEARY_RANKS"]
    trainer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    trainer.connect(folder + "/ranks.sock")
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    descriptors = array.array("i", [out_read, err_read])
    trainer.sendmsg([json.dumps(me).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    os.close(out_read)
    os.close(err_read)
    answer = trainer.recv(64)
    if answer == b"stop":
        os._exit(0)  # the run ends, and this rank has not begun
    if not answer:  # else the trainer reads from now on
        os._exit(70)
    with open(folder + "/rank.json", "rb") as file:
        order = json.load(file)
    parent = os.getpid()
    failed_read, failed_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(70)
            os.dup2(out_write, 1)
            os.dup2(err_write, 2)
            trainer.close()
            alveary_exec.as_found()
            alveary_exec.start(order["argv"], order["cwd"], dict(os.environ))
        except alveary_exec.Problem as problem:
            os.write(failed_write, json.dumps([problem.code, str(problem)]).encode())
            os._exit(problem.code)
        except BaseException as error:
            os.write(failed_write, json.dumps([alveary_exec.NOT_FOUND, f"the process cannot be set up: {error}"]).encode())
        os._exit(alveary_exec.NOT_FOUND)
    os.close(out_write)
    os.close(err_write)
    os.close(failed_write)
    with os.fdopen(failed_read, "rb") as pipe:
        failed = pipe.read()
    rank = Rank(child)
    for number in (*ENDING, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, rank.passed_on)
    noted = threading.Event()

    def listen() -> None:
        try:
            while True:
                word = trainer.recv(64)
                if word == b"stop":
                    rank.stopping = True
                    rank.ask()
                else:
                    break  # "noted", or the trainer is gone
        except OSError:
            pass  # the trainer is gone, and the shim ends all of this
        noted.set()

    threading.Thread(target=listen, daemon=True).start()
    _, status = os.waitpid(child, 0)
    ended = {"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else {"exit_code": os.WEXITSTATUS(status)}
    ended["stopped"] = rank.asked
    if failed:
        ended["problem"] = json.loads(failed)[1]
    try:
        trainer.send(json.dumps(ended).encode())
        noted.wait()  # the launcher may act on it now
    except OSError:
        pass  # as above
    if rank.stopping:
        os._exit(0)
    if "signal" in ended:
        if ended["signal"] not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(ended["signal"], signal.SIG_DFL)
        os.kill(os.getpid(), ended["signal"])
    os._exit(ended.get("exit_code", 1))


if __name__ == "__main__":
    main()
