import os

import torch

# The tests' tensors are tiny. Threads would mostly wait for each other: on a busy machine, five times as long.
torch.set_num_threads(1)


def pytest_configure(config):
    """Triton's kernels run in its interpreter, on CPU tensors, unless `-m gpu` asks for the compiled ones."""
    if config.option.markexpr == "not gpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read by kernel.py when it is imported, which is later
