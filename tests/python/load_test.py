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
        """Schema, autograd registration, shapes under FakeTensor, and tracing of forward and backward."""
        checks = ("test_schema", "test_autograd_registration", "test_faketensor",
                  "test_aot_dispatch_static")
        z, featurizer, skip = draw(B, L, 18), draw(18, 3), draw(6)
        log_poles = -torch.rand(3, 4, dtype=torch.float64)
        cases = {
            "swr": (torch.rand(B, L, 3, dtype=torch.float64), draw(B, L, 3, 5), 16),
            "hyena_fir": (z, featurizer, draw(3, 7), skip),
            "hyena_modal": (z, featurizer, log_poles, draw(3, 4), skip),
        }
        for name, inputs in cases.items():
            with self.subTest(name):
                inputs = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
                torch.library.opcheck(getattr(ops, name).default, tuple(inputs), test_utils=checks)

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
