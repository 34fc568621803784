"""A WebSocket client that does as it is told, line by line."""

import hashlib
import os

from lines import obey
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

chats = {}


def open(name, uri, headers=()):
    try:
        chats[name] = connect(
            uri, additional_headers=[tuple(one) for one in headers], proxy=None, max_size=None, ping_interval=None
        )
    except InvalidStatus as refused:
        return {"status": refused.response.status_code, "body": refused.response.body.decode()}
    return {"status": 101}


def exchange(name, text):
    chats[name].send(text)
    return chats[name].recv(timeout=20)


def bulk(name, size):
    sent = os.urandom(size)
    chats[name].send(sent)
    return hashlib.sha256(sent).digest() == hashlib.sha256(chats[name].recv(timeout=60)).digest()


def ending(name):
    """Waits until the other side ends."""
    try:
        chats[name].recv(timeout=20)
        return "a message"
    except ConnectionClosed as closed:
        return type(closed).__name__


def close(name):
    chats.pop(name).close()
    return "closed"


obey({each.__name__: each for each in (open, exchange, bulk, ending, close)})
