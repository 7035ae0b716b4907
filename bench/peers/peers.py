"""Times what else there is for the work of our operators, on this machine, as `sarissa bench ops`
times ours: the same shapes, inputs rotated beyond the L2 cache, and beside each time its floor,
which is the bytes of inputs and outputs over the bandwidth of copies measured in the same run.

    python bench/peers/peers.py --lengths 2048,8192,32768 --json peers.jsonl

Each line of the JSON has the keys of `sarissa bench ops --json`, and `peer_of`: our operator that
does the same work or takes the same place in a layer. `direction` is fwd or fwd+bwd: autograd has
no backward alone. Before its time each peer is checked at a small shape against plain float64 on
the CPU.

Every peer gets its tensors in the layout that it likes best: the transposes that a layer would need
around it are not counted.
"""

import argparse
import dataclasses
import datetime
import difflib
import functools
import gc
import importlib
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HEAD_WIDTH = 128   # of attention
GROUP_WIDTH = 16   # widths are multiples of 64, as in `sarissa bench ops`
ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    width: int

    @property
    def heads(self):
        """[heads, head width]; one narrow head where the layer is too narrow."""
        heads = max(1, self.width // HEAD_WIDTH)
        return heads, self.width // heads


class Unavailable(Exception):
    """Why a peer can't run here."""


# ---- Hyena: gates and a causal convolution, channels first as torch's convolutions want them


def conv(x_BDL, taps_DW):
    """Causal depthwise convolution; the last tap is that of the current step."""
    length, width = x_BDL.shape[2], taps_DW.shape[1]
    y = F.conv1d(x_BDL, taps_DW[:, None], padding=width - 1, groups=taps_DW.shape[0])
    return y[..., :length]


def gates(z, featurizer):
    """Post-gate and gated input, from the thirds [post-gate | pre-gate | value] of z [B, 3D, L]."""
    post, pre, value = conv(z, featurizer).chunk(3, dim=1)
    return post, pre * value


def conv_inputs(taps, skip, shape, draw):
    """z [B, 3D, L], featurizer [3D, 3], taps [D, W] and perhaps skip [D]."""
    inputs = [draw(shape.batch, 3 * shape.width, shape.length), draw(3 * shape.width, 3),
              draw(shape.width, taps)]
    return inputs + [draw(shape.width)] if skip else inputs


def conv_and_gates(z, featurizer, taps, skip=None):
    post, u = gates(z, featurizer)
    y = conv(u, taps)
    return post * (y if skip is None else y + skip[:, None] * u)


def fft_inputs(shape, draw):
    """z [B, 3D, L], featurizer [3D, 3], skip [D], and a filter [D, L] in float32 whose first tap is
    that of the current step."""
    taps = draw(shape.width, shape.length, dtype=torch.float32)
    decay = torch.exp(-8 / shape.length * torch.arange(shape.length, device=taps.device))
    return [draw(shape.batch, 3 * shape.width, shape.length), draw(3 * shape.width, 3),
            draw(shape.width), taps * decay]


def fft_and_gates(z, featurizer, skip, taps):
    post, u = gates(z, featurizer)
    size = 2 * u.shape[2]
    product = torch.fft.rfft(u.float(), n=size) * torch.fft.rfft(taps, n=size)
    y = torch.fft.irfft(product, n=size)[..., :u.shape[2]].to(u.dtype)
    return post * (y + skip[:, None] * u)


def fft_reference(z, featurizer, skip, taps):
    return conv_and_gates(z, featurizer, taps.flip(1), skip)


def interleaved_reference(z, featurizer, taps, skip):
    """cuDNN's fused operator: the three channels of a gate are neighbours."""
    def thirds(x, dim):
        return torch.cat([x.index_select(dim, torch.arange(i, x.shape[dim], 3)) for i in range(3)],
                         dim)
    return conv_and_gates(thirds(z, 1), thirds(featurizer, 0), taps, skip)


@functools.cache
def fused_convolution():
    """(function, name) of NVIDIA's fused two-stage causal convolution."""
    why = []
    for module, package in (("cudnn.ops", "nvidia-cudnn-frontend"),
                            ("subquadratic_ops_torch.b2b_causal_conv1d",
                             "subquadratic-ops-torch-cu13")):
        try:
            return importlib.import_module(module).b2b_causal_conv1d, package
        except Exception as error:  # a library that is there but broken raises anything
            why.append(f"{package}: {one_line(error)}")
    raise Unavailable("; ".join(why))


# ---- attention and linear attention: q, k, v [B, L, H, P]


def attention_inputs(shape, draw):
    return [draw(shape.batch, shape.length, *shape.heads) for _ in range(3)]


def sdpa(backend, q, k, v):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2),
                                              v.transpose(1, 2), is_causal=True).transpose(1, 2)


def windowed(window, q, k, v):
    return torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False,
        window_size_left=window - 1, window_size_right=0)[0]


def attention_reference(window, q, k, v):
    """Each step sees itself and the window - 1 steps before it."""
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    unseen = (distance < 0) | (distance >= window)
    scores = torch.einsum("blhp,bshp->bhls", q, k) / math.sqrt(q.shape[3])
    weights = scores.masked_fill(unseen, -math.inf).softmax(dim=3)
    return torch.einsum("bhls,bshp->blhp", weights, v)


def gla_inputs(shape, draw):
    """q, k, v, and the logarithm of each head's decay [B, L, H]."""
    decay = draw(shape.batch, shape.length, shape.heads[0], dtype=torch.float32)
    return [*attention_inputs(shape, draw), F.logsigmoid(decay)]


@functools.cache
def simple_gla():
    try:
        return importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    except Exception as error:  # as above
        raise Unavailable(f"flash-linear-attention: {one_line(error)}") from error


def gla_reference(q, k, v, decay):
    state, outputs = 0, []
    for t in range(q.shape[1]):
        state = (state * decay[:, t, :, None, None].exp() +
                 torch.einsum("bhp,bhq->bhpq", k[:, t], v[:, t]))
        outputs.append(torch.einsum("bhp,bhpq->bhq", q[:, t], state) / math.sqrt(q.shape[3]))
    return torch.stack(outputs, dim=1)


# ---- the table


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    peer_of: str
    inputs: Callable        # (shape, draw) -> tensors
    run: Callable           # tensors -> output
    reference: Callable     # the same in float64 on a CPU
    uncounted: int = 0      # inputs at the end that are not in the floor
    needs_gpu: bool = False
    # The library that does the work; raises Unavailable.
    library: Callable = lambda: f"torch {torch.__version__}"


def torch_convolution(name, peer_of, taps, skip):
    return Peer(name, peer_of, functools.partial(conv_inputs, taps, skip), conv_and_gates,
                conv_and_gates)


def attention(name, peer_of, run, window=math.inf, **options):
    return Peer(name, peer_of, attention_inputs, run,
                functools.partial(attention_reference, window), **options)


def cudnn_version():
    return f"cuDNN {torch.backends.cudnn.version()}, torch {torch.__version__}"


def fused(name, peer_of, taps):
    return Peer(name, peer_of, functools.partial(conv_inputs, taps, True),
                lambda *inputs: fused_convolution()[0](*inputs), interleaved_reference,
                needs_gpu=True, library=lambda: fused_convolution()[1])


def windowed_attention(window):
    # Phalanx with blocks of 128 sees 128 to 255 steps: the nearest of ours to both windows.
    return attention(f"attention_w{window}", "phalanx_w128", functools.partial(windowed, window),
                     window, needs_gpu=True)


PEERS = [
    torch_convolution("torch_conv_7", "hyena_se", 7, False),
    torch_convolution("torch_conv_128", "hyena_mr", 128, True),
    # The filter is given, and not in the floor: an operator of 16 modes, as ours, never reads it.
    Peer("torch_fft", "hyena_li", fft_inputs, fft_and_gates, fft_reference, uncounted=1),
    fused("cudnn_b2b_7", "hyena_se", 7),
    fused("cudnn_b2b_128", "hyena_mr", 128),
    attention("attention_cudnn", "phalanx_full",
              functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION), needs_gpu=True,
              library=cudnn_version),
    attention("attention_flash", "phalanx_full",
              functools.partial(sdpa, SDPBackend.FLASH_ATTENTION)),
    windowed_attention(128),
    windowed_attention(512),
    Peer("fla_simple_gla", "phalanx_full", gla_inputs,
         lambda *inputs: simple_gla()(*inputs)[0], gla_reference, needs_gpu=True,
         library=lambda: simple_gla() and f"fla {importlib.import_module('fla').__version__}"),
]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Between their stages torch's operators round to bfloat16; on a GPU its float32 may be TF32.
BOUNDS = {"bfloat16": 1e-2, "float32": 1e-3}


# ---- timing


class Stopwatch:
    """Times as sarissa/cli/stopwatch.h does."""

    COPY_BYTES = {"cuda": 1_600_000_000, "cpu": 128_000_000}
    COPY_SECONDS = 0.3
    MOST_DELAY_COPIES = 20
    HOST_MARGIN = 2  # of the host's time, which varies

    def __init__(self, device):
        self.device = device
        count = self.COPY_BYTES[device.type] // 4
        self.source = torch.ones(count, device=device)
        self.target = torch.ones(count, device=device)
        self.copy_ms, self.host_ms = 0.0, 0.0
        self.copy_ms = self.time(lambda _: self.target.copy_(self.source), self.COPY_SECONDS)[0]
        self.copy_gb_per_s = 8e-6 * count / self.copy_ms

    def time(self, call, seconds):
        """Median time of a call in ms, and (p75 - p25) / median, over batches of calls."""
        self.calls, self.host_ms = 0, 0.0
        start = time.perf_counter()
        one = self.batch(call, 1)
        while True:
            one = min(one, self.batch(call, 3 if one < 1e3 * seconds else 1))
            if time.perf_counter() - start >= 0.2 * seconds:
                break
        host_ms = self.HOST_MARGIN * self.host_ms
        calls = max(1.0, 1e3 * seconds / max(one, host_ms, 1e-4))
        count = min(max(1, round(calls / 21)), 32)
        if host_ms > 0 and self.copy_ms > 0:
            # No more than the host can issue while the longest delay lasts.
            count = min(count, max(1, int(self.MOST_DELAY_COPIES * self.copy_ms / host_ms) - 1))
        fewest = 9 if one < 100 * seconds else 3
        batches = min(max(round(calls / count), fewest), 51)
        times = [self.batch(call, count) for _ in range(batches)]
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        return median, (high - low) / median

    def batch(self, call, count):
        if self.device.type == "cpu":
            start = time.perf_counter()
            for _ in range(count):
                self.next(call)
            return 1e3 * (time.perf_counter() - start) / count
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.copy_ms > 0:
            # Copies that last until the host has issued the whole batch, so that its own time is
            # never part of it.
            needed = 1 + int(self.HOST_MARGIN * self.host_ms * (count + 1) / self.copy_ms)
            for _ in range(min(needed, self.MOST_DELAY_COPIES)):
                self.target.copy_(self.source)
        start = time.perf_counter()
        self.next(call)
        begin.record()
        for _ in range(count):
            self.next(call)
        end.record()
        self.host_ms = 1e3 * (time.perf_counter() - start) / (count + 1)
        end.synchronize()
        return begin.elapsed_time(end) / count

    def next(self, call):
        call(self.calls)
        self.calls += 1


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def drawer(device, dtype):
    generator = torch.Generator(device).manual_seed(1)
    return lambda *shape, dtype=dtype: torch.randn(*shape, generator=generator, device=device,
                                                   dtype=dtype)


class Work:
    """call(i) runs the peer on the i-th of several copies of its tensors; results are kept, so that
    by the time a copy is used again nothing of it is left in the cache."""

    LEAST_BYTES = 256_000_000  # of all copies, where the cache is small or unknown
    MOST_COPIES = 1024

    def __init__(self, peer, direction, inputs, l2_bytes):
        self.peer, self.backward = peer, direction == "fwd+bwd"
        counted = inputs[:len(inputs) - peer.uncounted]
        with torch.no_grad():
            output = peer.run(*inputs)
        self.bytes = nbytes(counted) + nbytes([output])
        if self.backward:  # reads inputs and the output's gradient, writes the inputs' gradients
            self.bytes += 2 * nbytes(counted) + nbytes([output])
            inputs = [*inputs, torch.empty_like(output).normal_()]
        wanted = max(self.LEAST_BYTES, 4 * l2_bytes + 1)
        copies = (1 if self.bytes >= 2 * wanted else
                  min(self.MOST_COPIES, 1 + math.ceil(wanted / self.bytes)))
        self.inputs = [inputs] + [[x.clone() for x in inputs] for _ in range(copies - 1)]
        self.results = [None] * copies
        if self.backward:
            for copy in self.inputs:
                for x in copy[:-1]:
                    x.requires_grad_(True)

    def __call__(self, i):
        i %= len(self.inputs)
        inputs = self.inputs[i]
        self.results[i] = None
        if self.backward:
            output = self.peer.run(*inputs[:-1])
            gradients = torch.autograd.grad(output, inputs[:-1], inputs[-1])
            self.results[i] = output.detach(), gradients
        else:
            with torch.no_grad():
                self.results[i] = self.peer.run(*inputs)


def relative_error(got, want):
    got = got.double().cpu()
    return ((got - want).norm() / want.norm()).item() if got.isfinite().all() else math.inf


class Bench:
    CHECK_LENGTH, CHECK_WIDTH = 300, 256

    def __init__(self, options):
        self.options = options
        name = options.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(name)
        self.dtype = DTYPES[options.dtype]
        self.start = time.monotonic()
        self.facts = facts(self.device)
        self.l2_bytes = 0
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device.index or 0)
            self.l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.json = open(options.json, "w") if options.json else None
        self.timed = 0

    def run(self):
        self.watch = Stopwatch(self.device)
        say(f"{self.facts['device']}: copies run at {self.watch.copy_gb_per_s:.0f} GB/s "
            "(read + written)")
        peers = [peer for peer in PEERS if not self.options.ops or peer.name in self.options.ops]
        errors = {}
        for peer in peers:
            try:
                if peer.needs_gpu and self.device.type != "cuda":
                    raise Unavailable("needs a GPU")
                peer.library()
                errors[peer] = self.check(peer)
            except Unavailable as why:
                say(f"{peer.name}: skipped: {why}")
            except Exception as error:  # the peers are other people's: say it and go on
                say(f"{peer.name}: skipped: {one_line(error)}")
        print(f"{'peer':17}{'dir':8}{'batch':>6}{'length':>8}{'width':>7}{'dtype':>10}{'ms':>11}"
              f"{'spread':>9}{'GB/s':>9}{'floor ms':>11}{'ratio':>9}  error")
        # Short ones first: where the time runs out only long ones are missing.
        for length in sorted(self.options.lengths):
            for peer in errors:
                for direction in ("fwd", "fwd+bwd"):
                    shape = Shape(self.options.batch, length, self.options.width)
                    self.measure(peer, direction, shape, errors[peer])
        if self.json:
            self.json.close()

    def check(self, peer):
        """Relative error at a small shape; an odd number of steps."""
        shape = Shape(2, self.CHECK_LENGTH + 1, min(self.options.width, self.CHECK_WIDTH))
        inputs = peer.inputs(shape, drawer(self.device, self.dtype))
        with torch.no_grad():
            got = peer.run(*inputs)
            want = peer.reference(*(x.double().cpu() for x in inputs))
        return relative_error(got, want)

    def measure(self, peer, direction, shape, error):
        row = {"op": peer.name, "direction": direction, "batch": shape.batch,
               "length": shape.length, "width": shape.width, "dtype": self.options.dtype,
               "ms": None, "spread": None, "bytes": 0, "gb_per_s": None, "floor_ms": None,
               "ratio": None, "copy_gb_per_s": self.watch.copy_gb_per_s, "kernel": peer.library(),
               "error": error if math.isfinite(error) else None,
               "bound": BOUNDS[self.options.dtype], "failure": "", **self.facts}
        if not error <= row["bound"]:
            row["failure"] = "FAILED"
        elif time.monotonic() - self.start > self.options.limit:
            row["failure"] = f"not timed: {self.options.limit:g} s were over"
        else:
            try:
                self.time(peer, direction, shape, row)
                self.timed += 1
            except torch.OutOfMemoryError:
                row["failure"] = "out of memory"
            except Exception as failure:  # as above
                row["failure"] = ("out of memory" if "DefaultCPUAllocator" in str(failure)
                                  else one_line(failure))
        # What the failed call held must go before the next one starts.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        row["date"] = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
        row["peer_of"] = peer.peer_of
        print_row(row)
        if self.json:
            print(json.dumps(row), file=self.json, flush=True)

    def time(self, peer, direction, shape, row):
        work = Work(peer, direction, peer.inputs(shape, drawer(self.device, self.dtype)),
                    self.l2_bytes)
        row["bytes"] = work.bytes
        row["floor_ms"] = 1e-6 * work.bytes / self.watch.copy_gb_per_s
        row["ms"], row["spread"] = self.watch.time(work, self.options.seconds)
        row["gb_per_s"] = 1e-6 * work.bytes / row["ms"]
        row["ratio"] = row["ms"] / row["floor_ms"]


def print_row(row):
    line = (f"{row['op']:17}{row['direction']:8}{row['batch']:6}{row['length']:8}{row['width']:7}"
            f"{row['dtype']:>10}")
    if row["failure"]:
        print(f"{line}     {row['failure']}", flush=True)
    else:
        print(f"{line}{row['ms']:11.4f}{100 * row['spread']:8.1f}%{row['gb_per_s']:9.1f}"
              f"{row['floor_ms']:11.4f}{row['ratio']:9.3f}  {row['error']:.2g}", flush=True)


def facts(device):
    """What is the same in every row."""
    def output(*command):
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                                  check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            return ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        cpu = pathlib.Path("/proc/cpuinfo").read_text().partition("model name")[2]
        name = cpu.partition(": ")[2].partition("\n")[0] or "unknown processor"
        name, driver = f"{name}, {torch.get_num_threads()} threads", ""
    return {"device": name, "driver": driver, "torch": torch.__version__,
            "commit": output("git", "rev-parse", "--short=12", "HEAD")}


def one_line(error):
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def say(text):
    print(text, file=sys.stderr, flush=True)


def parse(arguments):
    def several(text):
        return [item for item in text.split(",") if item]

    def lengths(text):
        return [positive(item) for item in several(text)]

    def positive(text, kind=int):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text}: expected more than 0")
        return value

    def names(text):
        known = [peer.name for peer in PEERS]
        for name in several(text):
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise argparse.ArgumentTypeError(
                    f"'{name}': no such peer" + (f" (did you mean '{near[0]}'?)" if near else
                                                 "; there are " + " ".join(known)))
        return several(text)

    def width(text):
        value = positive(text)
        if value % 64 != 0:
            raise argparse.ArgumentTypeError(f"{text}: expected a multiple of 64")
        return value

    parser = argparse.ArgumentParser(
        description="Times the peers of our operators.", allow_abbrev=False,
        epilog="example: python bench/peers/peers.py --ops torch_conv_7 --lengths 2048")
    add = functools.partial(parser.add_argument, metavar="")
    add("--ops", type=names, default=[], help="peers, all of them without it: " +
        " ".join(peer.name for peer in PEERS))
    add("--lengths", type=lengths, default=[2048, 8192, 32768], help="steps per sequence")
    add("--width", type=width, default=4096, help="channels; heads have 128")
    add("--batch", type=positive, default=1, help="sequences")
    add("--dtype", choices=DTYPES, default="bfloat16", help="bfloat16 or float32")
    add("--device", default="auto",
        help="cpu, cuda, cuda:N, or auto: the first GPU if there is one")
    add("--seconds", type=functools.partial(positive, kind=float), default=0.2,
        help="time spent on timing each case")
    add("--limit", type=functools.partial(positive, kind=float), default=55,
        help="seconds after which no other case is started")
    add("--json", help="also write each case as one object on a line of this file")
    return parser.parse_args(arguments)


def main(arguments=None):
    bench = Bench(parse(arguments))
    bench.run()
    if bench.timed == 0:
        sys.exit("peers.py: nothing was timed, see above")


if __name__ == "__main__":
    main()
