"""ms over length, log-log, one line for each operator: our operators solid, peers dashed. An SVG.

    python bench/peers/plot.py ops.jsonl peers.jsonl -o docs/images/operators.svg

The files are those of `sarissa bench ops --json` and of peers.py. Without options, what the first
record shows (device, type, width, batch) is drawn, forward. Needs nothing but Python.
"""

import argparse
import math
import pathlib
import sys
from xml.sax.saxutils import escape

import records

# Readable on white and on black: each has a contrast of 3 or more to both.
COLORS = ("#2f81f7", "#d9730d", "#2f9e44", "#8b6cef", "#d6409f", "#0c8fa5", "#b07d00", "#e5484d")
GREY = "#768390"
FONT_SIZE, LABEL_HEIGHT = 12, 15
LEFT, RIGHT, TOP, BOTTOM, WIDTH, LEAST_HEIGHT = 64, 210, 64, 48, 900, 420
DIRECTION_NAMES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward"}


def spread(wanted, gap, low, high):
    """Places as near as possible to those wanted (ascending), `gap` or more apart, in [low, high]."""
    # Neighbours that would come too close form a block around the mean of what they want.
    blocks = []  # [sum of (wanted - offset in block), count]
    for place in wanted:
        blocks.append([place, 1])
        while len(blocks) > 1:
            (above, n), (below, m) = blocks[-2:]
            if above / n + n * gap <= below / m:
                break
            blocks[-2:] = [[above + below - m * n * gap, n + m]]
    places = [total / count + i * gap for total, count in blocks for i in range(count)]
    for i, place in enumerate(places):  # the borders
        places[i] = max(place, low + i * gap)
    for i, place in enumerate(places):
        places[i] = min(place, high - (len(places) - 1 - i) * gap)
    return places


class Scale:
    """Maps values to pixels, both logarithmic."""

    def __init__(self, values, begin, end):
        self.low, self.high = math.log(min(values)), math.log(max(values))
        if self.high - self.low < 1e-9:
            self.low, self.high = self.low - 1, self.high + 1
        self.begin, self.end = begin, end

    def __call__(self, value):
        fraction = (math.log(value) - self.low) / (self.high - self.low)
        return self.begin + fraction * (self.end - self.begin)


def ticks(low, high):
    """1, 2 and 5 times powers of ten in [low, high]; powers alone where that would be many."""
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [step * 10.0 ** power for power in powers for step in steps]
    return [value for value in found if low * 0.999 <= value <= high * 1.001]


def text(x, y, content, anchor="start", color=GREY, size=FONT_SIZE, kind=None, weight=None):
    extra = f' class="{kind}"' if kind else ""
    extra += f' font-weight="{weight}"' if weight else ""
    return (f'<text{extra} x="{x:.1f}" y="{y:.1f}" fill="{color}" font-size="{size}" '
            f'text-anchor="{anchor}">{escape(content)}</text>')


def path(points, color, dashed=False, width=2.0):
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    line = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (f'<path d="{line}" fill="none" stroke="{color}" stroke-width="{width}" '
            f'stroke-linejoin="round"{dash}/>')


def series(rows, names):
    """{operator: ([(length, ms)], is a peer)} of what has a time, ours first."""
    found = {}
    for row in sorted(rows, key=records.is_peer):
        if not row["failure"] and (not names or row["op"] in names):
            found.setdefault(row["op"], ([], records.is_peer(row)))[0].append(
                (row["length"], row["ms"]))
    return {op: (sorted(points), peer) for op, (points, peer) in found.items()}


def floor(rows, lines):
    """(operator, [(length, floor ms)]) of the first operator drawn."""
    first = next(iter(lines))
    return first, sorted((row["length"], row["floor_ms"]) for row in rows
                         if row["op"] == first and not row["failure"])


def svg(rows, names, title):
    lines = series(rows, names)
    floor_of, floor_points = floor(rows, lines)
    all_points = [*floor_points, *(point for points, _ in lines.values() for point in points)]
    height = max(LEAST_HEIGHT, TOP + BOTTOM + LABEL_HEIGHT * (len(lines) + 1))
    right, bottom = WIDTH - RIGHT, height - BOTTOM
    lengths = sorted({length for length, _ in all_points})
    x = Scale(lengths, LEFT + 8, right - 8)
    low, high = min(ms for _, ms in all_points), max(ms for _, ms in all_points)
    y = Scale((low / 1.15, high * 1.15), bottom, TOP)

    yield (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
           'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace">')
    yield f"<title>{escape(title)}</title>"
    yield text(LEFT, 24, title, size=15, weight="bold")
    yield text(LEFT, 44, "ms per call over the length; solid: Sarissa, dashed: peers, dotted: what "
               f"the bytes of {floor_of} take")
    for value in ticks(low, high):
        yield path([(LEFT, y(value)), (right, y(value))], GREY, width=0.4)
        yield text(LEFT - 8, y(value) + 4, f"{value:g}", anchor="end")
    last = -math.inf
    for length in lengths:
        yield path([(x(length), TOP), (x(length), bottom)], GREY, width=0.4)
        if x(length) - last > 40:
            last = x(length)
            yield text(last, bottom + 20, records.length_name(length), anchor="middle")

    dots = " ".join(f"{x(length):.1f},{y(ms):.1f}" for length, ms in floor_points)
    yield (f'<polyline points="{dots}" fill="none" stroke="{GREY}" stroke-width="1.5" '
           'stroke-dasharray="1.5 4"/>')
    ends = []
    for i, (op, (points, peer)) in enumerate(lines.items()):
        color = COLORS[i % len(COLORS)]
        pixels = [(x(length), y(ms)) for length, ms in points]
        yield path(pixels, color, dashed=peer, width=1.6 if peer else 2.2)
        for a, b in pixels:
            yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.2" fill="{color}"/>'
        ends.append((*pixels[-1], op, color))
    ends.sort(key=lambda end: end[1])
    half = LABEL_HEIGHT / 2
    places = spread([end[1] for end in ends], LABEL_HEIGHT, TOP + half, bottom - half)
    for (a, b, op, color), place in zip(ends, places):
        yield path([(a, b), (right + 36, place), (right + 44, place)], color, width=0.7)
        yield text(right + 48, place + 4, op, color=color, kind="label")
    yield "</svg>"


def parse(arguments):
    parser = argparse.ArgumentParser(description="ms over length as an SVG.", allow_abbrev=False)
    parser.add_argument("files", nargs="+", help="JSON lines of 'sarissa bench ops' and peers.py")
    parser.add_argument("-o", "--output", required=True, help="SVG file to write")
    parser.add_argument("--direction", choices=DIRECTION_NAMES, default="fwd")
    parser.add_argument("--ops", type=lambda names: names.split(","), default=[],
                        help="operators and peers to draw, all of them without it")
    for key in ("device", "dtype"):
        parser.add_argument(f"--{key}", help="that of the first record without it")
    for key in ("width", "batch"):
        parser.add_argument(f"--{key}", type=int, help="that of the first record without it")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    try:
        rows = records.with_sums(records.read(options.files))
    except (OSError, records.BadRecord) as error:
        sys.exit(f"plot.py: {error}")
    drawn = [row for row in rows if row["direction"] == options.direction]
    chosen = {}
    for key in ("device", "dtype", "width", "batch"):
        chosen[key] = getattr(options, key) or (drawn[0][key] if drawn else None)
        drawn = [row for row in drawn if row[key] == chosen[key]]
    unknown = set(options.ops) - {row["op"] for row in drawn}
    if unknown:
        sys.exit(f"plot.py: no such operator in the files: {', '.join(sorted(unknown))}")
    if not series(drawn, options.ops):
        sys.exit(f"plot.py: nothing to draw: no times of {options.direction} for {chosen}")
    left_out = {row["device"] for row in rows} - {chosen["device"]}
    if left_out:
        print(f"plot.py: left out what ran on {', '.join(sorted(left_out))}", file=sys.stderr)
    title = (f"{chosen['device']}: operators {DIRECTION_NAMES[options.direction]}, width "
             f"{chosen['width']}, {chosen['dtype']}")
    if chosen["batch"] != 1:
        title += f", batch {chosen['batch']}"
    output = pathlib.Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(svg(drawn, options.ops, title)) + "\n")


if __name__ == "__main__":
    main()
