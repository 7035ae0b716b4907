"""The records of `sarissa bench ops --json` and of peers.py, for table.py and plot.py."""

import collections
import json
import pathlib

KEYS = ("op", "direction", "batch", "length", "width", "dtype", "ms", "floor_ms", "ratio",
        "copy_gb_per_s", "failure", "device")


class BadRecord(Exception):
    """A file that is not such records; says where."""


def read(paths):
    """The rows of all files, in their order. A case that comes again replaces the earlier one."""
    rows = {}
    for path in paths:
        for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                missing = [key for key in KEYS if key not in row]
            except (json.JSONDecodeError, TypeError) as error:
                raise BadRecord(f"{path}:{number}: not a JSON object: {error}") from error
            if missing:
                raise BadRecord(f"{path}:{number}: has no {', '.join(missing)}")
            rows[key_of(row)] = row
    return list(rows.values())


def key_of(row):
    return tuple(row[key] for key in ("device", "dtype", "width", "batch", "length", "op",
                                      "direction"))


def with_sums(rows):
    """Also a row fwd+bwd of every operator of ours, which is timed forward and backward apart."""
    by_key = {key_of(row): row for row in rows}
    result = list(rows)
    for row in rows:
        if row["direction"] != "fwd":
            continue
        backward = by_key.get(key_of({**row, "direction": "bwd"}))
        if backward is None or key_of({**row, "direction": "fwd+bwd"}) in by_key:
            continue
        failure = row["failure"] or backward["failure"]
        ms = None if failure else row["ms"] + backward["ms"]
        floor_ms = None if failure else row["floor_ms"] + backward["floor_ms"]
        result.append({**row, "direction": "fwd+bwd", "ms": ms, "floor_ms": floor_ms,
                       "ratio": None if failure else ms / floor_ms, "failure": failure})
    return result


def is_peer(row):
    return "peer_of" in row


def operators(rows):
    """{name of an operator of ours: names of its peers}, in order of appearance. Peers of an
    operator without rows come under None."""
    ours = list(dict.fromkeys(row["op"] for row in rows if not is_peer(row)))
    result = {name: [] for name in ours}
    for row in filter(is_peer, rows):
        peers = result.setdefault(row["peer_of"] if row["peer_of"] in ours else None, [])
        if row["op"] not in peers:
            peers.append(row["op"])
    return result


def grouped(rows, *keys):
    """{values of the keys: rows}, in order of appearance."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def length_name(length):
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
