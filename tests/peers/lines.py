"""One JSON object a line: commands on standard input, their answers and events on standard output."""

import json
import sys
import threading

_lock = threading.Lock()


def say(**what):
    with _lock:
        print(json.dumps(what), flush=True)


def obey(commands):
    """Does each command on a thread of its own, until standard input ends."""
    say(event="ready")
    for line in sys.stdin:
        request = json.loads(line)
        threading.Thread(target=_do, args=(commands, request), daemon=True).start()


def _do(commands, request):
    number, name = request.pop("id"), request.pop("do")
    try:
        say(id=number, answer=commands[name](**request))
    except Exception as error:
        say(id=number, error=f"{type(error).__name__}: {error}")
