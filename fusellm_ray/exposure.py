"""What anyone who reaches a cluster's ports could do there without a token."""

from __future__ import annotations

import http.client
import urllib.request

from ray._private.authentication.authentication_utils import is_token_auth_enabled

_ADVICE = "start the cluster and its jobs with RAY_AUTH_MODE=token"


def warn_of_open_cluster(dashboard_url: str) -> list[str]:
    """Of the cluster that this process has joined.

    Args:
        dashboard_url: HOST:PORT as Ray gives it, or empty.
    """
    if not is_token_auth_enabled():  # and yet we were let in
        return [f"the cluster has no authentication: whoever reaches its ports can run code on it; {_ADVICE}"]
    if dashboard_url and is_open(f"http://{dashboard_url}"):
        return [
            f"the dashboard at {dashboard_url} answers without a token: whoever reaches it can run jobs; {_ADVICE}"
        ]
    return []


def is_open(dashboard: str) -> bool:
    """Whether a dashboard lists its jobs to a caller without a token; not if it cannot be reached from here."""
    try:
        with urllib.request.urlopen(f"{dashboard}/api/jobs/", timeout=5) as answer:
            return answer.status == 200
    except (OSError, http.client.HTTPException):  # refusals by HTTP status are OSErrors
        return False
