"""Stands between a launcher (torchrun, mpirun) and one rank; standard library alone: `python -I -S alveary_rank.py`.

Tells the trainer, over $ALVEARY_RANKS/ranks.sock, which rank this is, and hands it the read ends of the rank's stdout and
stderr; starts what $ALVEARY_RANKS/rank.json says; reports how it ended, and ends the same way. The launcher's SIGTERM is
passed on, and its SIGKILL reaches the rank through the kernel (prctl(2) PR_SET_PDEATHSIG).
"""

import array
import ctypes
import json
import os
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1
NAMES = {  # of torchrun, of Open MPI
    "rank": ("RANK", "OMPI_COMM_WORLD_RANK"),
    "local_rank": ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "world_size": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"),
    "local_world_size": ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
}


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
    if not trainer.recv(64):  # the trainer reads from now on
        sys.exit(70)
    with open(folder + "/rank.json", "rb") as file:
        order = json.load(file)
    asked: list = []  # type: ignore[type-arg]
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(70)
            os.dup2(out_write, 1)
            os.dup2(err_write, 2)
            trainer.close()
            os.close(out_write)
            os.close(err_write)
            os.chdir(order["cwd"])
            os.execvp(order["argv"][0], order["argv"])
        except OSError as error:
            os.write(2, "cannot start {}: {}\n".format(order["argv"][0], error.strerror).encode())
        os._exit(127)
    os.close(out_write)
    os.close(err_write)

    def passed_on(number: int, _: object) -> None:
        asked.append(number)
        try:
            os.kill(child, number)
        except ProcessLookupError:
            pass  # it has ended by itself

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, passed_on)
    _, status = os.waitpid(child, 0)
    ended = {"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else {"exit_code": os.WEXITSTATUS(status)}
    ended["stopped"] = any(number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT) for number in asked)
    try:
        trainer.send(json.dumps(ended).encode())
        trainer.recv(64)  # noted: the launcher may act on it now
    except OSError:
        pass  # the trainer is gone, and the shim ends all of this
    if "signal" in ended:
        signal.signal(ended["signal"], signal.SIG_DFL) if ended["signal"] not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), ended["signal"])
    os._exit(ended.get("exit_code", 1))


if __name__ == "__main__":
    main()
