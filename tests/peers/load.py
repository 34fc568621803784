"""Requests at a constant rate: some connections that stay, and one after another that do not. Counts what fails."""

import http.client
import select
import threading
import time

from lines import obey

changed = threading.Condition()
totals = {"succeeded": 0, "reopened": 0, "failed": {}}
stopped = threading.Event()
threads = []


def count(failure=None, reopened=0):
    with changed:
        totals["reopened"] += reopened
        if failure is None:
            totals["succeeded"] += 1
        else:
            totals["failed"][failure] = totals["failed"].get(failure, 0) + 1
        changed.notify_all()


def is_closed(connection):
    """Whether the server ended the connection while nothing was asked: any client opens another one then."""
    return connection.sock is None or bool(select.select([connection.sock], [], [], 0)[0])


def ask(connection, path, lane):
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        return None if answer.status == 200 else f"{lane}: status {answer.status}"
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        return f"{lane}: {type(error).__name__}: {error}"


def pace(each_seconds):
    due = time.monotonic()
    while not stopped.is_set():
        yield
        due += each_seconds
        stopped.wait(max(0, due - time.monotonic()))


def staying(host, port, path, each_seconds):
    connection = http.client.HTTPConnection(host, port, timeout=20)
    connection.connect()
    for _ in pace(each_seconds):
        reopened = 0
        if is_closed(connection):
            connection.close()
            reopened = 1
        count(ask(connection, path, "staying"), reopened)


def fresh(host, port, path, each_seconds):
    for _ in pace(each_seconds):
        connection = http.client.HTTPConnection(host, port, timeout=20)
        count(ask(connection, path, "fresh"))
        connection.close()


def start(host, port, path, staying_count, staying_per_second, fresh_count, fresh_per_second):
    for lane, lanes, rate in ((staying, staying_count, staying_per_second), (fresh, fresh_count, fresh_per_second)):
        for _ in range(lanes):
            threads.append(threading.Thread(target=lane, args=(host, port, path, lanes / rate), daemon=True))
    for thread in threads:
        thread.start()
    return "started"


def progress(more):
    """Waits for so many more that ended."""

    def ended():
        return totals["succeeded"] + sum(totals["failed"].values())

    with changed:
        wanted = ended() + more
        changed.wait_for(lambda: ended() >= wanted, timeout=20)
        return totals


def stop():
    stopped.set()
    for thread in threads:
        thread.join()
    return totals


obey({each.__name__: each for each in (start, progress, stop)})
