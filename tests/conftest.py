"""For all tests: one thread, so that numbers repeat; and `build` importable from every folder."""

import torch

torch.set_num_threads(1)
