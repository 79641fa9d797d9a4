"""What the tests of clients share."""

from clients.ranks import outcomes

__all__ = ["outcomes"]
