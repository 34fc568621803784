"""One tier of the photo example: an ordinary HTTP server that knows nothing of a mesh.

    service.py NAME PORT MARKER [UPSTREAM_URL]

GET /        answers with its name, the caller's address as the kernel shows it, and the marker.
GET /deeper  asks UPSTREAM_URL the same and puts the answer behind its own.
"""

import sys
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

UPSTREAM_TIMEOUT_SECONDS = 15


class Tier(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        lines = [f"{name} was asked by {self.client_address[0]} {marker}"]
        status = 200
        if self.path == "/deeper" and upstream:
            try:
                with urllib.request.urlopen(upstream, timeout=UPSTREAM_TIMEOUT_SECONDS) as answer:
                    lines.append(answer.read().decode())
            except OSError as reason:
                status = 502
                lines.append(f"{upstream} did not answer: {reason}")
        body = "\n".join(lines).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


name, port, marker = sys.argv[1], int(sys.argv[2]), sys.argv[3]
upstream = sys.argv[4] if len(sys.argv) > 4 else None
server = Server(("0.0.0.0", port), Tier)
print("listening", flush=True)
server.serve_forever()
