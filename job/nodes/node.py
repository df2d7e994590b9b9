"""Which node of a run this is, and where the nodes meet: from the settings, or from a Kubernetes Indexed Job.

In an Indexed Job every pod has its number in JOB_COMPLETION_INDEX. With a headless service as its subdomain it is known
as `<job>-<number>.<service>.<namespace>.svc...`, so that each pod can tell the name of number 0 from its own.
"""

import os
import socket
from dataclasses import dataclass

from job.errors import ConfigError
from job.settings_groups import ParallelSettings

_INDEX_VARIABLE = "JOB_COMPLETION_INDEX"


@dataclass(frozen=True)
class Node:
    """This node's rank among `nodes`; all meet at `port` of `host`, which is node 0, within `wait_s` seconds. Node 0
    listens on all of its addresses, so that its own `host` is empty."""

    rank: int
    nodes: int
    host: str
    port: int
    wait_s: float


def find_node(parallel: ParallelSettings) -> Node:
    """Return which node this is. Raises ConfigError where that, or where node 0 is, can't be told."""
    rank, source = _find_rank(parallel)
    if rank >= parallel.nodes:
        raise ConfigError(
            f"{source}={rank}: nodes are numbered from 0 on, and SFT_PARALLEL__NODES={parallel.nodes}",
            hint="give each node a number of its own below SFT_PARALLEL__NODES; an Indexed Job has as many completions",
        )
    host = "" if rank == 0 else _find_host(parallel.host)
    return Node(rank, parallel.nodes, host, parallel.port, parallel.wait_minutes * 60)


def _find_rank(parallel: ParallelSettings) -> tuple[int, str]:
    """Return the node's rank and the variable that says so."""
    if parallel.node_rank != "auto":
        return parallel.node_rank, "SFT_PARALLEL__NODE_RANK"
    if parallel.nodes == 1:
        return 0, "SFT_PARALLEL__NODE_RANK"
    index = os.environ.get(_INDEX_VARIABLE)
    if index is None:
        raise ConfigError(
            f"SFT_PARALLEL__NODE_RANK=auto: which of the {parallel.nodes} nodes this is can't be told, for there is no "
            f"{_INDEX_VARIABLE}",
            hint="set SFT_PARALLEL__NODE_RANK on each node, from 0 on; an Indexed Job of Kubernetes does it by itself",
        )
    if not index.isascii() or not index.isdigit():
        raise ConfigError(f"{_INDEX_VARIABLE}={index}: not a number", hint="set SFT_PARALLEL__NODE_RANK instead")
    return int(index), _INDEX_VARIABLE


def _find_host(host: str) -> str:
    if host != "auto":
        return host
    own_name, index = socket.getfqdn(), os.environ.get(_INDEX_VARIABLE)
    label, _, service = own_name.partition(".")
    if index is None or not service or not label.endswith(f"-{index}"):
        raise ConfigError(
            f"SFT_PARALLEL__HOST=auto: where node 0 is can't be told from this host's own name, {own_name}",
            hint="set SFT_PARALLEL__HOST to node 0's address; an Indexed Job with a headless service as its subdomain "
            "needs none",
        )
    return f"{label.removesuffix(index)}0.{service}"
