"""Answers on each of many sockets."""

import select


def serve(worker):
    poll = select.poll()
    by_number = {sock.fileno(): sock for sock in worker.sockets}
    for number in by_number:
        poll.register(number, select.POLLIN)
    worker.ready()
    while not worker.stopping:
        for number, _ in poll.poll(100):
            _, client = by_number[number].recvfrom(100)
            port = by_number[number].getsockname()[1]
            by_number[number].sendto(b'{"port": %d}' % port, client)
