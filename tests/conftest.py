"""Every test starts from the same random numbers, on one thread."""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # read by torch when it is imported, and by the processes that tests start

import random

import numpy
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# the same examples in every run; `--hypothesis-profile=default --hypothesis-seed=N` tries others
settings.register_profile("same-examples", derandomize=True)
settings.load_profile("same-examples")


@pytest.fixture(autouse=True)
def same_random_numbers():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--rank-kills", type=int, default=2, help="how often test_train_ranks kills a random rank")
    parser.addoption("--kills", type=int, default=20, help="how often test_train kills a running `metaopt train`")
    parser.addoption(
        "--emulated-device", action="store_true", help="build a device for test_emulated_device, and test on it"
    )


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def devices():
    """Return the names of the devices present, for parametrising."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


@pytest.fixture(params=devices())
def device(request):
    return torch.device(request.param)
