"""A WebSocket server that echoes."""

import socket
import sys

from lines import say
from websockets.sync.server import serve


def chat(connection):
    say(event="opened", path=connection.request.path)
    try:
        for message in connection:
            connection.send(message)
    finally:
        say(event="closed", path=connection.request.path)


both = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
with serve(chat, sock=both, max_size=None) as server:
    say(event="ready")
    server.serve_forever()
