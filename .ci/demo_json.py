"""Reads what `coinop demo --json` printed and checks that it is what the README promises: one object, these
fields, a verified result. Whether the job itself was right is the test suite's business."""

import json
import re
import sys


def hexes(digits):
    return lambda v: isinstance(v, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", v) is not None


PROMISED = {
    "request_id": hexes(64),
    "result_id": hexes(64),
    "kind": lambda v: isinstance(v, int) and 6000 <= v <= 6999,
    "status": lambda v: v == "success",
    "commit": hexes(40),
    "output_sha256": hexes(64),
    "verified": lambda v: v is True,
    "elapsed_ms": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0,
}


def main():
    text = sys.stdin.read()
    try:
        printed = json.loads(text)
    except ValueError as error:
        sys.exit(f"demo: stdout is not one JSON object: {error}")
    if not isinstance(printed, dict):
        sys.exit(f"demo: stdout is a {type(printed).__name__}, not an object")
    wrong = [
        f"{name} is missing" if name not in printed else f"{name} is {printed[name]!r}"
        for name, right in PROMISED.items()
        if name not in printed or not right(printed[name])
    ]
    if wrong:
        sys.exit("demo: " + "; ".join(wrong))
    print(f"demo: {len(PROMISED)} fields as promised, {printed['elapsed_ms']} ms")


main()
