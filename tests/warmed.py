"""Imported by the server of `warm` alone: all that a command imports before it begins."""

import rich.progress  # noqa: F401
import torch._dynamo
import torch.utils.tensorboard.summary  # noqa: F401

import metaopt.lab.train  # noqa: F401
from metaopt.registry import registry

registry.names()
