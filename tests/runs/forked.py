"""Has tests/runs/forking.py run a command: this one's words, folder, environment and streams.

python -IS tests/runs/forked.py SOCKET [-m NAME | FILE] ...
"""

import json
import os
import socket
import sys

_, path, *words = sys.argv
job = {"words": words, "cwd": os.getcwd(), "environment": dict(os.environ)}
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
    connection.connect(path)
    socket.send_fds(connection, [json.dumps(job).encode()], [0, 1, 2])
    code = int(connection.recv(16))
sys.exit(code if code >= 0 else 128 - code)
