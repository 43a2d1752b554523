"""How a process becomes a rank of a group."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch

from nanovllm.distributed.group import Communicator, TPGroup
from nanovllm.distributed.shared_memory import SharedMemoryCommunicator
from nanovllm.errors import ConfigError, PeerLost
from nanovllm.ops.library import Library, library_or_reason

logger = logging.getLogger(__name__)


def join_group(
    rank: int,
    size: int,
    *,
    init_method: str,
    device: torch.device,
    timeout_s: float,
    host: str = "",
    address: str | None = None,
) -> TPGroup:
    """Wait until all `size` ranks are here, and find the fastest way for them to speak: shared memory between
    CPUs of one host, gloo between other CPUs, NCCL between GPUs.

    init_method: where they meet, as torch.distributed writes it: "file:///...", "tcp://host:port" or "env://",
    torchrun's. One rank meets nobody. timeout_s: for which a rank waits for another, here and in a step.
    host: a name of this one, where it is known: ranks of different hosts need not try to share memory.
    address: of this host for gloo, which otherwise looks up the host's name unless GLOO_SOCKET_IFNAME is set.
    ConfigError for an init_method that cannot be; PeerLost if a rank does not come.
    """
    if size == 1:
        return TPGroup()
    import torch.distributed as dist

    try:
        store = _store(dist, rank, size, init_method, timeout_s)
        return TPGroup(rank, size, _communicator(store, rank, size, device, timeout_s, host, address))
    except RuntimeError as error:  # of several kinds, for as many kinds of stores
        raise PeerLost(f"the {size} ranks did not meet at {init_method} within {timeout_s:g} s: {error}") from error


def _store(dist: Any, rank: int, size: int, init_method: str, timeout_s: float) -> Any:
    """A place for keys of this group alone: torchrun's store serves all groups that a program ever makes."""
    timeout = timedelta(seconds=timeout_s)
    try:
        store, _, _ = next(dist.rendezvous(init_method, rank, size, timeout=timeout))
    except dist.DistError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(f"the ranks cannot meet at {init_method!r}: {error}") from error
    store.set_timeout(timeout)
    nth = store.add(f"nanovllm/joins/{rank}", 1)
    return dist.PrefixStore(f"nanovllm/{nth}", store)


def _communicator(
    store: Any, rank: int, size: int, device: torch.device, timeout_s: float, host: str, address: str | None
) -> Communicator:
    from nanovllm.distributed.torch_group import GlooCommunicator, NCCLCommunicator

    if device.type != "cpu":
        return NCCLCommunicator(store, rank, size, device, timeout_s)
    library = library_or_reason()
    store.set(f"ready/{rank}", f"native kernels on {host}" if isinstance(library, Library) else "")
    found = {store.get(f"ready/{other}") for other in range(size)}
    if isinstance(library, Library) and len(found) == 1:
        try:
            return SharedMemoryCommunicator(library, rank, size, store, timeout_s)
        except ConnectionError as error:
            logger.info("%s: gloo sums instead", error)
    return GlooCommunicator(store, rank, size, timeout_s, address)
