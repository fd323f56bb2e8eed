"""Which Ray cluster a command is meant for."""

from __future__ import annotations

import os


def cluster_address() -> str | None:
    """What RAY_ADDRESS names; None where that is nothing, or `local`, Ray's word for a cluster of one's own."""
    address = os.environ.get("RAY_ADDRESS")
    return None if not address or address == "local" else address
