"""A gRPC client that does as it is told, line by line."""

import hashlib
import json
import queue
import threading

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lines import obey

ANY_SIZE = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

channels, channels_lock = {}, threading.Lock()
talks, calls = {}, {}


def channel(to):
    with channels_lock:
        if to not in channels:
            channels[to] = grpc.insecure_channel(to, options=ANY_SIZE)
        return channels[to]


def outcome(call, **more):
    """How a call ended. Of a failed one the error is the call."""
    trailers = {name: repr(value) for name, value in call.trailing_metadata() or ()}
    return {"code": call.code().value[0], "details": call.details(), "trailers": trailers, **more}


def unary(to, method="Unary", size=0, text=None, timeout=20, metadata=()):
    request = text.encode() if text is not None else bytes(size)
    stub = channel(to).unary_unary(f"/culvert.Test/{method}")
    try:
        answer, call = stub.with_call(request, timeout=timeout, metadata=[tuple(one) for one in metadata])
        first = {name: repr(value) for name, value in call.initial_metadata()}
        return outcome(call, same=answer == request, first=first)
    except grpc.RpcError as error:
        return outcome(error)


def down(to, count, size):
    stub = channel(to).unary_stream("/culvert.Test/Down")
    call = stub(json.dumps({"count": count, "size": size}).encode(), timeout=60)
    digest = hashlib.sha256()
    try:
        for message in call:
            digest.update(message)
        return outcome(call, sha256=digest.hexdigest())
    except grpc.RpcError as error:
        return outcome(error)


def up(to, count, size):
    messages = [bytes([number % 256]) * size for number in range(count)]
    stub = channel(to).stream_unary("/culvert.Test/Up")
    try:
        answer, call = stub.with_call(iter(messages), timeout=60)
        digest = hashlib.sha256(b"".join(messages)).hexdigest()
        return outcome(call, heard=json.loads(answer), sha256=digest)
    except grpc.RpcError as error:
        return outcome(error)


def talk(to, name, method="Talk"):
    """Begins a stream both ways."""
    said = queue.Queue()
    call = channel(to).stream_stream(f"/culvert.Test/{method}")(iter(said.get, None))
    talks[name] = (said, call)
    return "begun"


def exchange(name, text):
    said, call = talks[name]
    said.put(text.encode())
    try:
        return {"heard": next(call).decode()}
    except StopIteration:
        return outcome(call)
    except grpc.RpcError as error:
        return outcome(error)


def ending(name):
    """Waits until the server's side ends."""
    _, call = talks[name]
    try:
        for _ in call:
            pass
        return outcome(call)
    except grpc.RpcError as error:
        return outcome(error)


def finish(name):
    said, call = talks[name]
    said.put(None)
    return ending(name)


def begin(to, name, method="Hang"):
    calls[name] = channel(to).unary_unary(f"/culvert.Test/{method}").future(b"")
    return "begun"


def cancel(name):
    return calls[name].cancel()


def health(to, service):
    stub = health_pb2_grpc.HealthStub(channel(to))
    try:
        answer, call = stub.Check.with_call(health_pb2.HealthCheckRequest(service=service), timeout=20)
        return outcome(call, status=answer.status)
    except grpc.RpcError as error:
        return outcome(error)


obey({each.__name__: each for each in (unary, down, up, talk, exchange, ending, finish, begin, cancel, health)})
