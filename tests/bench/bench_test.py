"""`sarissa bench ops`, and the scripts of bench/peers/ that time, tabulate and plot beside it.

    python tests/bench/bench_test.py build/sarissa
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[2]
PEERS = ROOT / "bench" / "peers"
PROGRAM = None
# One thread: on a busy machine two would wait for each other in these small operators.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
OPERATORS = ["phalanx", "phalanx_w64", "phalanx_w128", "phalanx_full", "phalanx_kv", "hyena_se",
             "hyena_se_4", "hyena_se_14", "hyena_mr", "hyena_li", "rms_norm", "swiglu"]
# Those that are measured only where --op names them.
BY_NAME = [f"hyena_mr_{taps}" for taps in (8, 16, 32, 64, 256, 512, 1024)] + [
    "hyena_mr_g1", "hyena_mr_g2", "hyena_mr_g4", "hyena_mr_g8", "hyena_mr_g64", "hyena_li_g16"]
# Those that need nothing but torch, on any device.
TORCH_PEERS = ["torch_conv_7", "torch_conv_128", "torch_fft", "attention_flash"]
KEYS = ["op", "direction", "batch", "length", "width", "dtype", "ms", "spread", "bytes", "gb_per_s",
        "floor_ms", "ratio", "copy_gb_per_s", "kernel", "error", "bound", "failure", "device",
        "driver", "torch", "commit", "date"]
WITHOUT_STATE = ("rms_norm", "swiglu")


def run(*command, code=0):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode != code:
        raise AssertionError(f"{' '.join(map(str, command))}: exit code {done.returncode}, "
                             f"expected {code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done


def script(name, *arguments, code=0):
    return run(sys.executable, PEERS / name, *arguments, code=code)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(op, direction="fwd", length=2048, ms=1.0, **others):
    """A made-up record."""
    return {"op": op, "direction": direction, "batch": 1, "length": length, "width": 4096,
            "dtype": "bfloat16", "ms": ms, "spread": 0.01, "bytes": 1, "gb_per_s": 1.0,
            "floor_ms": 0.5, "ratio": ms and ms / 0.5, "copy_gb_per_s": 3000.0, "kernel": "march",
            "error": 0.002, "bound": 0.01, "failure": "" if ms else "out of memory",
            "device": "Made-up card", "driver": "1.2", "torch": "2.11.0", "commit": "abc",
            "date": "2026-01-01T00:00:00Z", **others}


class BenchTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = tempfile.TemporaryDirectory()
        cls.folder = pathlib.Path(cls.scratch.name)

    @classmethod
    def tearDownClass(cls):
        cls.scratch.cleanup()

    def write(self, name, rows):
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def check_timed(self, line, device):
        """One record with a time."""
        self.assertEqual(line["failure"], "")
        self.assertIn(device, line["device"])
        self.assertLessEqual(line["error"], line["bound"])
        self.assertGreater(line["ms"], 0)
        self.assertGreaterEqual(line["spread"], 0)
        self.assertGreater(line["bytes"], 0)
        self.assertAlmostEqual(line["gb_per_s"], line["bytes"] / line["ms"] * 1e-6, delta=1e-6 *
                               line["gb_per_s"])
        self.assertAlmostEqual(line["floor_ms"], line["bytes"] / line["copy_gb_per_s"] * 1e-6,
                               delta=1e-6 * line["floor_ms"])
        self.assertAlmostEqual(line["ratio"], line["ms"] / line["floor_ms"],
                               delta=1e-6 * line["ratio"])
        self.assertRegex(line["date"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")

    # sarissa bench ops

    def bench_ops(self, *options, code=0):
        return run(PROGRAM, "bench", "ops", "--device", "cpu", *options, code=code)

    def test_every_operator_has_a_time_in_every_direction(self):
        path = self.folder / "all.jsonl"
        done = self.bench_ops("--lengths", 40, "--width", 64, "--step-batch", 3, "--seconds", 0.01,
                              "--json", path)
        lines = read(path)
        cases = [(op, direction) for op in OPERATORS for direction in ("fwd", "bwd", "step")
                 if direction != "step" or op not in WITHOUT_STATE]
        self.assertEqual([(line["op"], line["direction"]) for line in lines], cases)
        self.assertEqual(len(done.stdout.splitlines()), 1 + len(cases))
        for line in lines:
            with self.subTest(line["op"], direction=line["direction"]):
                self.assertEqual(list(line), KEYS)
                self.check_timed(line, "threads")
                step = line["direction"] == "step"
                self.assertEqual((line["batch"], line["length"]), (3, 1) if step else (1, 40))
                self.assertEqual((line["width"], line["dtype"]), (64, "bfloat16"))
        # z [L, 3D] and y [L, D], and taps [G, 7] and a featurizer [3D, 3].
        [se] = [line for line in lines if (line["op"], line["direction"]) == ("hyena_se", "fwd")]
        self.assertEqual(se["bytes"], 2 * (4 * 40 * 64 + 4 * 7 + 3 * 64 * 3))

    def test_points_of_curves_have_times_where_they_are_named(self):
        path = self.folder / "curves.jsonl"
        self.bench_ops("--op", ",".join(BY_NAME), "--lengths", 40, "--width", 128, "--step-batch",
                       2, "--seconds", 0.001, "--json", path)
        lines = {(line["op"], line["direction"]): line for line in read(path)}
        self.assertEqual(sorted(lines), sorted((op, direction) for op in BY_NAME
                                               for direction in ("fwd", "bwd", "step")))
        for line in lines.values():
            with self.subTest(line["op"], direction=line["direction"]):
                self.check_timed(line, "threads")
        # Taps [G, W]; the state [B, W-1, D] in float32, read and written by a step.
        floor = 2 * (4 * 40 * 128 + 3 * 128 * 3 + 128)
        for op, taps in (("hyena_mr_8", 8 * 8), ("hyena_mr_1024", 8 * 1024),
                         ("hyena_mr_g1", 128 * 128), ("hyena_mr_g64", 2 * 128)):
            self.assertEqual(lines[op, "fwd"]["bytes"], floor + 2 * taps)
        step = lines["hyena_mr_1024", "step"]["bytes"] - lines["hyena_mr_8", "step"]["bytes"]
        self.assertEqual(step, 2 * 8 * (1024 - 8) + 2 * 4 * 2 * (1024 - 8) * 128)

    def test_options_choose_cases(self):
        path = self.folder / "chosen.jsonl"
        self.bench_ops("--op", "hyena_se,rms_norm", "--direction", "bwd", "--lengths", "16,20",
                       "--width", 128, "--batch", "1,2", "--dtype", "float32", "--seconds", 0.01,
                       "--json", path)
        self.assertEqual([(line["op"], line["direction"], line["batch"], line["length"])
                          for line in read(path)],
                         [(op, "bwd", batch, length) for op in ("hyena_se", "rms_norm")
                          for batch in (1, 2) for length in (16, 20)])

    def test_what_does_not_fit_is_said_and_the_rest_goes_on(self):
        path = self.folder / "large.jsonl"
        done = self.bench_ops("--op", "swiglu", "--direction", "fwd", "--lengths", f"{1 << 40},8",
                              "--width", 64, "--seconds", 0.01, "--json", path, code=1)
        large, small = read(path)
        self.assertEqual(large["failure"], "out of memory")
        self.assertIsNone(large["ms"])
        self.check_timed(small, "threads")
        self.assertIn("1 of 2", done.stderr.splitlines()[-1])

    def test_bad_options_are_bad_usage(self):
        for options, words in ((("--op", "phalamx"), ["phalamx", "'phalanx'"]),
                               (("--width", 100), ["--width 100", "multiple of 64"]),
                               (("--lengths", 0), ["--lengths 0"]),
                               (("--direction", "fw"), ["'fw'", "'fwd'"]),
                               (("--op", "swiglu", "--direction", "step"), ["swiglu", "no step"]),
                               (("--dtype", "float8"), ["float8"]),
                               (("--seconds", 0), ["--seconds 0"])):
            with self.subTest(options):
                done = self.bench_ops(*options, code=2)
                self.assertEqual(done.stdout, "")
                [line] = done.stderr.splitlines()
                for word in words:
                    self.assertIn(word, line)

    # peers.py

    def test_peers_of_plain_torch_run_on_a_cpu(self):
        path = self.folder / "peers.jsonl"
        done = script("peers.py", "--device", "cpu", "--lengths", "24,16", "--width", 64,
                      "--seconds", 0.01, "--json", path)
        lines = read(path)
        self.assertEqual([(line["length"], line["op"], line["direction"]) for line in lines],
                         [(length, op, direction) for length in (16, 24) for op in TORCH_PEERS
                          for direction in ("fwd", "fwd+bwd")])
        for line in lines:
            with self.subTest(line["op"], direction=line["direction"]):
                self.assertEqual(list(line), [*KEYS, "peer_of"])
                self.assertIn(line["peer_of"], OPERATORS)
                self.check_timed(line, "threads")
        # The same bytes as ours, but for taps that are not shared by 16 channels: forward z, y and
        # parameters, and in both directions those twice more, for the gradients.
        forward, both = [line["bytes"] for line in lines[:2]]
        self.assertEqual(forward, 2 * (4 * 16 * 64 + 64 * 7 + 3 * 64 * 3))
        self.assertEqual(both, forward + 2 * (7 * 16 * 64 + 2 * (64 * 7 + 3 * 64 * 3)))
        for peer in ("cudnn_b2b_7", "attention_cudnn", "attention_w128", "fla_simple_gla"):
            self.assertRegex(done.stderr, f"(?m)^{peer}: skipped: ")

    def test_peers_stop_at_the_limit_and_say_so(self):
        path = self.folder / "limit.jsonl"
        done = script("peers.py", "--device", "cpu", "--ops", "torch_conv_7", "--lengths", 16,
                      "--width", 64, "--limit", 1e-9, "--json", path, code=1)
        self.assertIn("nothing was timed", done.stderr)
        for line in read(path):
            self.assertIn("not timed", line["failure"])
            self.assertIsNone(line["ms"])

    def test_peers_have_bad_usage_too(self):
        for options, word in ((("--ops", "torch_con_7"), "'torch_conv_7'"),
                              (("--width", 70), "multiple of 64"),
                              (("--lengths", "0"), "more than")):
            self.assertIn(word, script("peers.py", *options, code=2).stderr)

    # table.py

    def tables(self, *paths):
        """The cells of every line of every table."""
        return [[cell.strip() for cell in line.strip("|").split("|")]
                for line in script("table.py", *paths).stdout.splitlines() if line.startswith("|")]

    def test_table_puts_peers_below_our_operator(self):
        ours = self.write("ours.jsonl", [
            row("alpha", ms=0.6), row("alpha", length=8192, ms=2.0), row("alpha", "bwd", ms=1.4),
            row("beta", ms=0.0123), row("alpha", "step", length=1, ms=0.7)])
        peers = self.write("theirs.jsonl", [
            row("other", ms=5.0, peer_of="beta"),
            row("rival", "fwd+bwd", ms=123.4, peer_of="alpha"),
            row("rival", ms=None, length=8192, peer_of="alpha"),
            row("rival", ms=1.0, peer_of="alpha")])
        self.assertEqual(self.tables(ours, peers), [
            ["operator", "direction", "2K", "8K"],
            ["---", "---", "---:", "---:"],
            ["alpha", "fwd", "0.600 (1.20)", "2.00 (4.00)"],
            ["*rival*", "fwd", "1.00 (2.00)", "out of memory"],
            ["alpha", "bwd", "1.40 (2.80)", ""],
            ["alpha", "fwd+bwd", "2.00 (2.00)", ""],
            ["*rival*", "fwd+bwd", "123 (246.80)", ""],
            ["beta", "fwd", "0.0123 (0.02)", ""],
            ["*other*", "fwd", "5.00 (10.00)", ""],
            ["operator", "direction", "1"],
            ["---", "---", "---:"],
            ["alpha", "step", "0.700 (1.40)"]])
        text = script("table.py", ours, peers).stdout
        for fact in ("Made-up card", "bfloat16", "width 4096", "driver 1.2", "3000 GB/s"):
            self.assertIn(fact, text)

    def test_table_keeps_devices_and_widths_apart(self):
        path = self.write("cards.jsonl", [row("alpha"), row("alpha", device="Other card"),
                                          row("alpha", width=64), row("alpha", batch=8)])
        text = script("table.py", path).stdout
        self.assertEqual(re.findall("(?m)^## (.*)$", text),
                         ["Made-up card: bfloat16, width 4096", "Other card: bfloat16, width 4096",
                          "Made-up card: bfloat16, width 64"])
        self.assertEqual(len(re.findall(r"(?m)^\| alpha", text)), 4)

    def test_the_last_of_equal_cases_counts(self):
        path = self.write("again.jsonl", [row("alpha", ms=1.0), row("alpha", ms=3.0)])
        self.assertEqual(self.tables(path)[2:], [["alpha", "fwd", "3.00 (6.00)"]])

    def test_bad_files_are_named(self):
        broken = self.folder / "broken.jsonl"
        broken.write_text(json.dumps(row("alpha")) + "\nnot json\n")
        for name, options in (("table.py", ()), ("plot.py", ("-o", self.folder / "never.svg"))):
            self.assertIn("broken.jsonl:2", script(name, broken, *options, code=1).stderr)
            self.assertIn("missing", script(name, self.folder / "missing", *options, code=1).stderr)
        self.assertFalse((self.folder / "never.svg").exists())

    # plot.py

    def plot(self, *arguments):
        path = self.folder / "plot.svg"
        script("plot.py", *arguments, "-o", path)
        return ElementTree.fromstring(path.read_text())

    @staticmethod
    def texts(svg, kind=None):
        return [element for element in svg.iter("{http://www.w3.org/2000/svg}text")
                if kind is None or element.get("class") == kind]

    def crowd(self):
        """Many operators, as close together as ours are near the floor; two peers end early."""
        lengths = (2048, 8192, 32768, 131072)
        ours = self.write("many.jsonl", [
            row(op, direction, length, ms=length / 1e5 * (1 + 0.001 * i))
            for i, op in enumerate(OPERATORS) for direction in ("fwd", "bwd")
            for length in lengths])
        peers = self.write("crowd.jsonl", [
            row(f"peer <{i}>", direction, length, peer_of="phalanx",
                ms=None if i < 2 and length > 9000 else length / 1e5 * 3 ** i)
            for i in range(8) for direction in ("fwd", "fwd+bwd") for length in lengths])
        return ours, peers

    def test_plot_labels_every_operator_once(self):
        names = OPERATORS + [f"peer <{i}>" for i in range(8)]
        for direction in ("fwd", "fwd+bwd"):
            svg = self.plot(*self.crowd(), "--direction", direction)
            self.assertEqual(sorted(label.text for label in self.texts(svg, "label")),
                             sorted(names))

    def test_plot_labels_do_not_overlap_and_stay_inside(self):
        svg = self.plot(*self.crowd())
        _, _, width, height = map(float, svg.get("viewBox").split())
        boxes = []
        for text in self.texts(svg):
            size, x, y = (float(text.get(key)) for key in ("font-size", "x", "y"))
            length = 0.61 * size * len(text.text)  # of a monospaced font
            x -= {"start": 0, "middle": length / 2, "end": length}[text.get("text-anchor")]
            boxes.append((x, y - 0.8 * size, x + length, y + 0.2 * size, text.text))
        for i, (left, top, right, bottom, name) in enumerate(boxes):
            self.assertTrue(0 <= left and right <= width and 0 <= top and bottom <= height, name)
            for left2, top2, right2, bottom2, other in boxes[:i]:
                apart = (right <= left2 or right2 <= left or bottom <= top2 + 0.05 or
                         bottom2 <= top + 0.05)
                self.assertTrue(apart, f"{name} is on {other}")

    def test_plot_title_and_line_styles(self):
        svg = self.plot(*self.crowd())
        title = svg.find("{http://www.w3.org/2000/svg}title").text
        for fact in ("Made-up card", "width 4096", "bfloat16", "forward"):
            self.assertIn(fact, title)
        self.assertIn(title, [text.text for text in self.texts(svg)])
        lines = [path for path in svg.iter("{http://www.w3.org/2000/svg}path")
                 if float(path.get("stroke-width")) > 1]
        dashed = [path for path in lines if path.get("stroke-dasharray")]
        self.assertEqual((len(lines), len(dashed)), (len(OPERATORS) + 8, 8))

    def test_plot_is_readable_on_white_and_on_black(self):
        def luminance(color):
            channels = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        svg = self.plot(*self.crowd())
        colors = {element.get(key) for element in svg.iter() for key in ("fill", "stroke")}
        colors -= {None, "none"}
        self.assertGreater(len(colors), 5)
        for color in colors:
            for background in ("#ffffff", "#0d1117"):
                low, high = sorted((luminance(color), luminance(background)))
                self.assertGreaterEqual((high + 0.05) / (low + 0.05), 3, f"{color} on {background}")

    def test_plot_chooses(self):
        ours, peers = self.crowd()
        svg = self.plot(ours, peers, "--ops", "hyena_se,peer <3>")
        self.assertEqual(sorted(label.text for label in self.texts(svg, "label")),
                         ["hyena_se", "peer <3>"])
        path = self.folder / "never.svg"
        self.assertIn("hyena_sse", script("plot.py", ours, "--ops", "hyena_sse", "-o", path,
                                          code=1).stderr)
        self.assertIn("nothing to draw", script("plot.py", ours, "--width", 8, "-o", path,
                                                code=1).stderr)
        one = self.plot(self.write("one.jsonl", [row("alpha")]))
        self.assertEqual([label.text for label in self.texts(one, "label")], ["alpha"])


if __name__ == "__main__":
    PROGRAM = str(pathlib.Path(sys.argv.pop(1)).resolve())
    unittest.main(verbosity=2)
