"""What mpirun calls to start its daemon on another node; standard library alone: `alveary-rsh HOST COMMAND...`.

In ssh's place: asks the trainer of this node, which asks that of HOST to run the command, and stays for as long as it runs.
"""

import json
import os
import socket
import sys


def main() -> int:
    trainer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    trainer.connect(os.environ["ALVEARY_RANKS"] + "/ranks.sock")
    trainer.send(json.dumps({"launch": sys.argv[1], "command": " ".join(sys.argv[2:])}).encode())
    answer = trainer.recv(1 << 16)
    if not answer:
        sys.stderr.write("the trainer is gone\n")
        return 1
    told = json.loads(answer)
    if "error" in told:
        sys.stderr.write(told["error"] + "\n")
    return int(told.get("exit_code", 1))


if __name__ == "__main__":
    sys.exit(main())
