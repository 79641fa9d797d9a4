"""Imported by the server of `warm` alone: all that commands and ranks import before they begin."""

import rich.progress  # noqa: F401
import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.utils.tensorboard.summary  # noqa: F401

import metaopt.lab.training  # noqa: F401
from metaopt.registry import registry

registry.names()
# some need scipy, matplotlib and scikit-learn, which not everybody has who runs a test: they come last
for name in ("metaopt.testing", "metaopt.lab.comparison", "metaopt.lab.figures", "sklearn.datasets"):
    __import__(name)
