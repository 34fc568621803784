"""Asks one URL and says how it went: `ask.py URL`. Exit status 0 if it answered with 200."""

import sys
import urllib.request

TIMEOUT_SECONDS = 15

try:
    with urllib.request.urlopen(sys.argv[1], timeout=TIMEOUT_SECONDS) as answer:
        print(answer.read().decode())
except OSError as reason:
    print(f"no answer: {reason}")
    sys.exit(1)
