import os

import pytest
import torch

# The tests' tensors are tiny. Threads would mostly wait for each other: on a busy machine, five times as long.
torch.set_num_threads(1)


def pytest_configure(config):
    """Triton's kernels run in its interpreter, on CPU tensors, unless `-m gpu` asks for the compiled ones."""
    if config.option.markexpr == "not gpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read by kernel.py when it is imported, which is later


@pytest.fixture
def attention_calls(monkeypatch):
    """What the model hands to the operator, and gets: a list of dicts over calls, so over layers."""
    import moda
    from kernel import moda_attention

    calls = []

    def record(q, k, v, depth_k, depth_v, **kwargs):
        o = moda_attention(q, k, v, depth_k, depth_v, **kwargs)
        calls.append({"q": q, "k": k, "v": v, "depth_k": depth_k, "depth_v": depth_v, "o": o, **kwargs})
        return o

    monkeypatch.setattr(moda, "moda_attention", record)
    return calls
