"""Our operators and their peers side by side, as markdown on stdout.

    python bench/peers/table.py ops.jsonl peers.jsonl

The files are those of `sarissa bench ops --json` and of peers.py. One section for each device, type
and width; in it one table for each batch, and one of single steps. A cell holds ms and, in
brackets, the ratio to the floor. Our fwd+bwd is the sum of both.
"""

import argparse
import sys

import records

DIRECTIONS = ("fwd", "bwd", "fwd+bwd")


def number(value):
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def cell(row):
    if row is None:
        return ""
    if row["failure"]:
        return row["failure"].replace("|", "/")
    return f"{number(row['ms'])} ({row['ratio']:.2f})"


def table(rows, columns, column_key, column_name, directions):
    """A line for each operator and direction that has a row; peers in italics below ours."""
    found = {(row["op"], row["direction"], row[column_key]): row for row in rows}
    yield ["operator", "direction", *map(column_name, columns)]
    for ours, peers in records.operators(rows).items():
        for direction in directions:
            for op in (ours, *peers):
                cells = [found.get((op, direction, column)) for column in columns]
                if any(cells):
                    yield [op if op == ours else f"*{op}*", direction, *map(cell, cells)]


def markdown(lines):
    header, *rest = lines
    yield f"| {' | '.join(header)} |"
    yield f"| --- | --- |{' ---: |' * (len(header) - 2)}"
    for line in rest:
        yield f"| {' | '.join(line)} |"


def several(rows, key):
    return ", ".join(dict.fromkeys(str(row[key]) for row in rows if row.get(key)))


def section(device, dtype, width, rows):
    yield f"## {device}: {dtype}, width {width}"
    yield ""
    facts = [f"{label} {several(rows, key)}" for label, key in
             (("driver", "driver"), ("torch", "torch"), ("commit", "commit")) if several(rows, key)]
    for name, some in (("our", [row for row in rows if not records.is_peer(row)]),
                       ("the peers'", [row for row in rows if records.is_peer(row)])):
        if some:
            rates = dict.fromkeys(f"{row['copy_gb_per_s']:.0f}" for row in some)
            facts.append(f"copies in {name} run at {', '.join(rates)} GB/s")
    yield "; ".join(facts) + ". ms per call, and its ratio to the floor."
    for (batch,), some in records.grouped(
            [row for row in rows if row["direction"] in DIRECTIONS], "batch").items():
        yield from ["", f"Sequences: {batch}. Columns: length.", ""]
        lengths = sorted({row["length"] for row in some})
        yield from markdown(table(some, lengths, "length", records.length_name, DIRECTIONS))
    steps = [row for row in rows if row["direction"] == "step"]
    if steps:
        yield from ["", "One step of decoding. Columns: sequences.", ""]
        batches = sorted({row["batch"] for row in steps})
        yield from markdown(table(steps, batches, "batch", str, ("step",)))
    yield ""


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Our operators and their peers as markdown.")
    parser.add_argument("files", nargs="+", help="JSON lines of 'sarissa bench ops' and peers.py")
    options = parser.parse_args(arguments)
    try:
        rows = records.with_sums(records.read(options.files))
    except (OSError, records.BadRecord) as error:
        sys.exit(f"table.py: {error}")
    for (device, dtype, width), some in records.grouped(rows, "device", "dtype", "width").items():
        print("\n".join(section(device, dtype, width, some)))


if __name__ == "__main__":
    main()
