"""A gRPC server with a method of each kind. Messages are bytes; what happens to calls is told line by line."""

import hashlib
import json
import sys
import threading
from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from lines import say

ANY_SIZE = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def told(method):
    def call(request, context):
        say(event="call", method=method.__name__, peer=context.peer())
        return method(request, context)

    return call


@told
def unary(request, context):
    context.set_trailing_metadata((("x-trailer", "kept"), ("x-trailer-bin", b"\x00\xff")))
    context.send_initial_metadata((("x-first", "kept"),))
    return request


@told
def fail(request, context):
    context.set_trailing_metadata((("x-trailer", "kept"),))
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota of 100 % ünits")


@told
def down(request, context):
    wanted = json.loads(request)
    for number in range(wanted["count"]):
        yield bytes([number % 256]) * wanted["size"]


@told
def up(requests, context):
    digest, count = hashlib.sha256(), 0
    for request in requests:
        digest.update(request)
        count += 1
    return json.dumps({"count": count, "sha256": digest.hexdigest()}).encode()


@told
def talk(requests, context):
    context.add_callback(lambda: say(event="ended", method="talk"))
    yield from requests


@told
def denied_later(requests, context):
    context.add_callback(lambda: say(event="ended", method="denied_later"))
    yield from requests


@told
def hang(request, context):
    gone = threading.Event()
    context.add_callback(gone.set)
    say(event="hanging", remaining=context.time_remaining())
    gone.wait(30)
    say(event="ended", method="hang")
    return b""


METHODS = {
    "Unary": grpc.unary_unary_rpc_method_handler(unary),
    "Fail": grpc.unary_unary_rpc_method_handler(fail),
    "Down": grpc.unary_stream_rpc_method_handler(down),
    "Up": grpc.stream_unary_rpc_method_handler(up),
    "Talk": grpc.stream_stream_rpc_method_handler(talk),
    "DeniedLater": grpc.stream_stream_rpc_method_handler(denied_later),
    "Hang": grpc.unary_unary_rpc_method_handler(hang),
}


def main():
    server = grpc.server(futures.ThreadPoolExecutor(32), options=ANY_SIZE)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("culvert.Test", METHODS),))
    servicer = health.HealthServicer()
    servicer.set("culvert.Test", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"[::]:{sys.argv[1]}")
    server.start()
    say(event="ready")
    server.wait_for_termination()


main()
