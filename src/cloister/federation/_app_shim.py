"""Stands on SuperExec's path under the name of Flower's app command and asks the keeper to start that process.

Run as a file with `python -I -S`, so that it takes milliseconds: it imports nothing of cloister.
Arguments: the keeper's socket, the SuperExec's role, the command, and what SuperExec wants it to get.
"""

import json
import socket
import sys


def main() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as keeper:
        keeper.connect(sys.argv[1])
        keeper.sendall(json.dumps({"role": sys.argv[2], "argv": sys.argv[3:]}).encode())


if __name__ == "__main__":
    main()
