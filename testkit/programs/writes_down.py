"""Answers, and writes down what it was asked."""

import os
import time

record = os.open("record", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
pid = os.getpid()


def serve(worker):
    worker.ready()
    try:
        while True:
            client, _ = worker.sockets[0].accept()
            with client:
                answer(client)
    except BlockingIOError:
        os.write(record, f"{os.getpid()} ended\n".encode())


def answer(client):
    number = int(client.makefile("rb").readline())
    time.sleep(0.1 if number % 10 == 0 else 0.001)
    line = f"{os.getpid()} {number}\n".encode()
    os.write(record, line)
    client.sendall(line)
