"""Slots' gradients, summed along depth, by themselves. In whole models: test_fast.py."""

import pytest
import torch

import kernel
import slots


@pytest.mark.parametrize(
    "device, dtype",
    [
        ("cpu", torch.float16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("n_slot, n_first", [(1, 0), (2, 0), (5, 0), (9, 0), (2, 4), (5, 5), (9, 1), (9, 99)])
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("group, n_reader", [(1, 1), (1, 20), (3, 11), (5, 4), (8, 7), (20, 3)])
def test_slots_backward(group, n_reader, head_dim, n_slot, n_first, device, dtype):
    """Slots' gradients, summed over readers whose windows move on, against the backward of each reader in float64. All
    read the first n_first slots beside their window."""
    if device == "cpu":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    B, n_kv_head, T, first, n_all = 1, 2, 13, 3, 12  # T: more than the tokens of a program
    last, n_head, scale = first + n_slot, group * n_kv_head, 0.3

    def random(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    depth_k, depth_v = random(2, n_all, B, n_kv_head, T, head_dim)
    sums = torch.randn(2, 10, B, n_kv_head, T, head_dim, device=device)  # of the slots 2..11
    addresses = torch.empty(n_reader, 8, dtype=torch.int64, device=device)
    want = [x[first - 2 : last - 2].double() for x in sums]
    terms, readers = [x.square() for x in want], []
    for i in range(n_reader):
        start = max(0, last - 1 + (n_reader > 4) - i)  # the deepest of many sees none of these slots any more
        q, do = random(2, B, n_head, T, head_dim)
        reads = [*range(min(n_first, start)), *range(start, n_all)]
        k, v = depth_k[reads], depth_v[reads]
        o, lse = kernel._depth_forward_torch(
            q, k, v, torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.float32), scale
        )
        dq = torch.zeros_like(q)
        for run in (slice(min(n_first, start)), slice(start, n_all)):
            delta = kernel._depth_backward_triton(do, q, depth_k[run], depth_v[run], o, lse, scale, dq, slots=False)
        slots._addresses_kernel[(1,)](addresses[i], q, do, lse, delta, start)
        readers.append((q, do, lse, delta, start))
        dq_ = torch.zeros_like(q, dtype=torch.float64)
        grads = kernel._depth_backward_torch(*(x.double() for x in (do, q, k, v, o, lse)), scale, dq_)
        assert (dq - dq_).norm() <= 2**-7 * dq_.norm()
        for total, squares, grad in zip(want, terms, grads, strict=True):
            for slot, seen in zip(reads, grad, strict=True):
                if first <= slot < last:
                    total[slot - first] += seen
                    squares[slot - first] += seen.square()
    args = readers, addresses, depth_k, depth_v, first, last
    got = slots.slots_backward(*args, torch.float32, list(sums), 2, scale, n_first)
    for x, y, squares in zip(got, want, terms, strict=True):
        assert (x - y).norm() <= 2**-7 * squares.sum().sqrt()
    fresh = slots.slots_backward(*args, dtype, None, 0, scale, n_first)
    for x, y, old in zip(fresh, want, sums, strict=True):
        assert x.dtype == dtype and (x - (y - old[first - 2 : last - 2])).norm() <= 2**-6 * y.norm()
