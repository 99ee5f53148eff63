"""A server that crashes, waits or hangs as files say to its slot."""

import http.server
import os
import pathlib
import signal
import socket
import sys
import time

slot = sys.argv[1]
if pathlib.Path("crash" + slot).exists():
    sys.exit("as it was told to")
while pathlib.Path("wait" + slot).exists():
    time.sleep(0.01)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        while pathlib.Path("hang" + slot).exists():
            time.sleep(0.01)
        body = f'{{"slot": {slot}, "pid": {os.getpid()}}}\n'.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def finish(*_):
    while pathlib.Path("busy").exists():
        time.sleep(0.01)
    os._exit(0)


signal.signal(signal.SIGTERM, finish)
server = http.server.HTTPServer(("127.0.0.1", 8080), Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=3)
server.serve_forever()
