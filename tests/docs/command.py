"""Stands in for a program on the PATH of a page: asks `server.py` to run it."""

import json
import os
import socket
import sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.environ["RLP_PAGES_SOCKET"])
    program = os.path.basename(sys.argv[0])
    job = {
        "program": program,
        "arguments": sys.argv[1:],
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }
    socket.send_fds(server, [json.dumps(job).encode()], [1, 2])
    sys.exit(int(server.recv(16) or b"1"))
