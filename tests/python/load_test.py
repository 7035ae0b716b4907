"""The operators as a Python user gets them, checked against plain torch in float64, forward and
backward.

    SARISSA_LIBRARY=build/libsarissa.so PYTHONPATH=python python tests/python/load_test.py
"""

import unittest

import torch

from sarissa import ops

torch.manual_seed(0)
B, L = 2, 41


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def fir(u, taps):
    """y[t, d] = sum_k taps[d, k] u[t - k, d] for u [B, L, D], taps [D, W]."""
    width = taps.shape[1]
    padded = torch.nn.functional.pad(u.transpose(1, 2), (width - 1, 0))
    y = torch.nn.functional.conv1d(padded, taps.flip(1)[:, None], groups=taps.shape[0])
    return y.transpose(1, 2)


def gates(z, featurizer):
    """The thirds [post-gate | pre-gate | value] after the 3-tap featurizer."""
    return fir(z, featurizer).chunk(3, dim=2)


def per_channel(grouped, width):
    return grouped.repeat_interleave(width // grouped.shape[0], dim=0)


def hyena_fir(z, featurizer, taps, skip):
    post, pre, value = gates(z, featurizer)
    u = pre * value
    return post * (fir(u, per_channel(taps, u.shape[2])) + skip * u)


def hyena_modal(z, featurizer, log_poles, residues, skip):
    post, pre, value = gates(z, featurizer)
    u = pre * value
    times = torch.arange(z.shape[1], dtype=z.dtype)
    filters = (residues[:, :, None] * torch.exp(log_poles[:, :, None] * times)).sum(1)
    return post * (fir(u, per_channel(filters, u.shape[2])) + skip * u)


def swr(a, u, window):
    """x_t = sum over s of u_s times the a between s and t, from the start of the block before t's."""
    steps = []
    for t in range(a.shape[1]):
        start = max(0, (t // window - 1) * window) if window else 0
        x = torch.zeros_like(u[:, 0])
        for s in range(start, t + 1):
            x = a[:, s, :, None] * x + u[:, s]
        steps.append(x)
    return torch.stack(steps, dim=1)


def is_double(x):
    return isinstance(x, torch.Tensor) and x.dtype == torch.float64


def opcheck_cases():
    """(name, arguments) of every operator, those with optional states with and without them."""
    z, featurizer, skip = draw(B, L, 18), draw(18, 3), draw(6)
    z_state, fir_state, modal_state = draw(B, 2, 18), draw(B, 6, 6), draw(B, 6, 4)
    taps, log_poles, residues = draw(3, 7), -torch.rand(3, 4, dtype=torch.float64), draw(3, 4)
    u, dy = draw(B, L, 6), draw(B, L, 6)
    q, k, v = draw(B, L, 4, 8), draw(B, L + 5, 2, 8), draw(B, L + 5, 2, 8)
    frequencies = torch.rand(4)
    logits, targets, weights = draw(L, 9), torch.randint(0, 9, (L,)), draw(L)
    gain = draw(6)
    a, x, abcv = torch.rand(B, L, 3, dtype=torch.float64), draw(B, L, 3, 5), draw(B, L, 28)
    index = torch.tensor([3, 7], dtype=torch.int32)
    state = (draw(B, 3, 5), draw(B, 3), draw(B, 3, 5))
    none = (None,) * 4
    return [
        ("attention", q, k[:, :L], v[:, :L], 0),
        ("attention", q, k, v, 0),
        ("attention", q, k, v, 6),
        ("cross_entropy", logits, targets),
        ("cross_entropy_bwd", weights, logits, targets, ops.cross_entropy(logits, targets)),
        ("fir", u, taps),
        ("fir", u, taps, fir_state),
        ("fir_bwd", dy, fir_state, u, taps, fir_state),
        ("glu", u, "gelu"),
        ("glu_bwd", draw(B, L, 3), u, "gelu"),
        ("hyena_fir", z, featurizer, taps, skip),
        ("hyena_fir", z, featurizer, taps, skip, z_state, fir_state),
        ("hyena_fir_bwd", dy, z_state, fir_state, z, featurizer, taps, skip, z_state, fir_state),
        ("hyena_modal", z, featurizer, log_poles, residues, skip),
        ("hyena_modal", z, featurizer, log_poles, residues, skip, z_state, modal_state),
        ("hyena_modal", z, featurizer, log_poles, residues, skip, z_state, modal_state, True),
        ("hyena_modal_bwd", dy, z_state, modal_state, z, featurizer, log_poles, residues, skip,
         z_state, modal_state),
        ("linear_cross_entropy", draw(L, 6), draw(9, 6), targets, weights),
        ("modal", u, log_poles, residues),
        ("modal", u, log_poles, residues, skip, modal_state),
        ("modal_bwd", dy, modal_state, u, log_poles, residues, skip, modal_state),
        ("phalanx", abcv, 3, 1, 16, 0.9),
        ("phalanx", abcv, 3, 1, 16, 0.9, *state, index),
        ("phalanx_bwd", abcv, 3, 1, 16, 0.9, *state, index, None, draw(B, L, 15), *state),
        ("phalanx_bwd", abcv, 3, 1, 16, 0.9, *none, ops.phalanx(abcv, 3, 1, 16, 0.9)[5],
         draw(B, L, 15), None, None, None),
        ("residual_rms_norm", u, draw(B, L, 6), gain, 1e-6),
        ("rms_norm", u, gain, 1e-6),
        ("rms_norm_bwd", dy, draw(B, L, 6), u, gain, 1e-6),
        ("rope", q, frequencies, 3, 1.0),
        ("rope_bwd", q, frequencies, 3, 1.0),
        ("swr", a, x, 16),
        ("swr", a, x, 16, *state, index),
        ("swr_bwd", a, x, 16, *none, draw(B, L, 3, 5), None, None, None),
        ("swr_bwd", a, x, 16, *state, index, draw(B, L, 3, 5), *state),
    ]


class LoadTest(unittest.TestCase):
    def check(self, name, operator, reference, inputs):
        inputs = [x.requires_grad_() for x in inputs]
        got, want = operator(*inputs)[0], reference(*inputs)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=f"{name} forward")
        weight = torch.randn_like(want)
        got_gradients = torch.autograd.grad(got, inputs, weight)
        want_gradients = torch.autograd.grad(want, inputs, weight)
        for index, pair in enumerate(zip(got_gradients, want_gradients)):
            torch.testing.assert_close(
                *pair, rtol=1e-9, atol=1e-9, msg=f"{name}: gradient of argument {index}")

    def test_swr(self):
        a, u = torch.rand(B, L, 3, dtype=torch.float64), draw(B, L, 3, 5)
        for window in (16, 0):
            self.check("swr", lambda a, u: ops.swr(a, u, window),
                       lambda a, u: swr(a, u, window), [a.clone(), u.clone()])

    def test_hyena_fir(self):
        width = 6
        for taps in (1, 7, 64):
            self.check("hyena_fir", ops.hyena_fir, hyena_fir,
                       [draw(B, L, 3 * width), draw(3 * width, 3), draw(3, taps), draw(width)])

    def test_hyena_modal(self):
        width = 6
        log_poles = -torch.rand(3, 4, dtype=torch.float64) - 0.01
        self.check("hyena_modal", ops.hyena_modal, hyena_modal,
                   [draw(B, L, 3 * width), draw(3 * width, 3), log_poles, draw(3, 4), draw(width)])

    def test_opcheck(self):
        """All that torch.library.opcheck checks by itself: schema, autograd registration, shapes
        under FakeTensor, tracing of forward and backward with symbolic shapes."""
        cases = opcheck_cases()
        registered = {schema.name.removeprefix("sarissa::")
                      for schema in torch._C._jit_get_all_schemas()
                      if schema.name.startswith("sarissa::")}
        self.assertEqual({name for name, *_ in cases}, registered)
        for name, *inputs in cases:
            with self.subTest(name, inputs=len(inputs)):
                # Gradients have no gradients of their own.
                if not name.endswith("_bwd"):
                    inputs = [x.clone().requires_grad_() if is_double(x) else x for x in inputs]
                torch.library.opcheck(getattr(ops, name).default, tuple(inputs))

    def test_errors_are_exceptions_that_name_the_operator(self):
        with self.assertRaisesRegex(RuntimeError, "swr"):
            ops.swr(draw(B, L, 3), draw(B, L + 1, 3, 5), 16)

    def test_meta_tensors_give_shapes(self):
        a = torch.empty(B, L, 3, device="meta")
        x = ops.swr(a, torch.empty(B, L, 3, 5, device="meta"), 16)[0]
        self.assertEqual(x.shape, (B, L, 3, 5))
        self.assertEqual(x.device.type, "meta")


if __name__ == "__main__":
    unittest.main(verbosity=2)
