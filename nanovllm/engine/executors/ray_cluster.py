"""This process's connection to a Ray cluster, and room in it for ranks. Ray is imported where it is needed only."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from nanovllm.errors import ConfigError

_STORE_BYTES = 100 * 2**20  # of a cluster of our own: nothing of ours goes through Ray's object store
_REACH_S = 10.0  # for the cluster to accept a connection
_PLACEMENT_S = 30.0  # for others to leave the CPUs that they use


def require_ray() -> Any:
    """The module; ConfigError where it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f'Ray cannot be imported ({error}): pip install "nanovllm[ray]"') from error


class RayConnection:
    """A process has one. What its first user makes, the last one ends: the connection, and with it a cluster
    that was started for it. A connection that is there already is left as it is."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entrant, as garbage collection may leave in any place
        self._users = 0

    def enter(self, cpus: int) -> Callable[[], None]:
        """Be connected until the function that is returned is called: to the cluster of RAY_ADDRESS or of
        `ray start` on this host, else to one of our own that has as many CPUs. ConfigError where that cannot be."""
        ray = require_ray()
        with self._lock:
            if ray.is_initialized() and self._users == 0:
                return lambda: None
            if not ray.is_initialized():
                _connect(ray, cpus)
            self._users += 1
        return self._leave

    def _leave(self) -> None:
        ray = require_ray()
        with self._lock:
            self._users -= 1
            if self._users == 0 and ray.is_initialized():
                ray.shutdown()


CONNECTION = RayConnection()


def _connect(ray: Any, cpus: int) -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS={address}: ranks speak with this process directly, so it must run on a node of the "
            "cluster, as `ray job submit` has it"
        )
    host, _, port = address.rpartition(":")
    level = logging.WARNING
    try:
        if host and port.isdigit():  # Ray would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
        try:
            cpus = max(cpus, os.cpu_count() or 1)
            ray.init(num_cpus=cpus, object_store_memory=_STORE_BYTES, include_dashboard=False, logging_level=level)
        except ValueError:  # there is a cluster, which has as much of these as it has
            ray.init(address="auto", logging_level=level)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot connect to the Ray cluster {address or 'of this host'}: {error}") from error


class Placement:
    """A bundle of CPUs, and a GPU if asked, for each rank, on as few nodes as hold them; kept for us until it is
    removed, and actors in it then end.

    nodes: the id of each rank's. Ranks of one node are neighbours, and this process's node comes first.
    """

    def __init__(self, size: int, cpus: int, gpus: int) -> None:
        """cpus, gpus: of a rank. ConfigError if the cluster has too few, or others do not leave them in time."""
        ray = require_ray()
        from ray.util.placement_group import placement_group, placement_group_table

        self._bundle = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        wanted = f"{size} ranks with {cpus} CPUs" + (f" and {gpus} GPU each" if gpus else " each")
        _require_room([node["Resources"] for node in ray.nodes() if node["Alive"]], size, self._bundle, wanted)
        self._group = placement_group([self._bundle] * size, strategy="PACK")
        try:
            if not self._group.wait(_PLACEMENT_S):
                free = ray.available_resources()
                raise ConfigError(
                    f"{wanted} found no room in the Ray cluster within {_PLACEMENT_S:g} s: others use it, and "
                    f"{_amounts([free], self._bundle)} are free"
                )
            node_of = placement_group_table(self._group)["bundles_to_node_id"]
        except BaseException:
            self.remove()
            raise
        here = ray.get_runtime_context().get_node_id()
        self._bundles = sorted(range(size), key=lambda i: (node_of[i] != here, node_of[i], i))  # of each rank
        self.nodes = [node_of[i] for i in self._bundles]

    def options(self, rank: int) -> dict[str, Any]:
        """Of a rank's actor."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=self._bundles[rank])
        gpus = {"num_gpus": self._bundle["GPU"]} if "GPU" in self._bundle else {}
        return {"num_cpus": self._bundle["CPU"], **gpus, "scheduling_strategy": strategy}

    def remove(self) -> None:
        """Harmless when repeated."""
        from ray.util.placement_group import remove_placement_group

        if require_ray().is_initialized():  # otherwise it has gone with the connection
            remove_placement_group(self._group)


def _require_room(nodes: Sequence[dict[str, float]], size: int, bundle: dict[str, int], wanted: str) -> None:
    """nodes: the resources of each."""
    room = sum(min(int(node.get(kind, 0) // count) for kind, count in bundle.items()) for node in nodes)
    if room < size:
        raise ConfigError(
            f"{wanted} do not fit into the Ray cluster, whose {len(nodes)} nodes have {_amounts(nodes, bundle)}: "
            "lower tensor_parallel_size" + (", or set device='cpu'" if "GPU" in bundle else " or num_threads")
        )


def _amounts(nodes: Sequence[dict[str, float]], kinds: dict[str, int]) -> str:
    """Such as "2 + 4 CPUs and 0 + 1 GPUs"."""
    return " and ".join(f"{' + '.join(f'{node.get(kind, 0):g}' for node in nodes)} {kind}s" for kind in kinds)
