"""What a rank runs on: versions, device, host; and where ranks differ."""

import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

from ringattn.launch.session import Session
from ringattn.parallel.host import cpu_name, describe_host
from ringattn.parallel.topology import ranks_per_node

PACKAGES = (
    "ringattn", "torch", "numpy", "triton", "deepspeed", "flash-attn", "flash-attn-3",
    "nvidia-cudnn-frontend", "mpi4py", "transformers",
)  # fmt: skip
_GIB = 1 << 30
_DRIVER = Path("/proc/driver/nvidia/version")
_MEMORY = Path("/proc/meminfo")


def describe_rank(session: Session) -> dict[str, Any]:
    """Versions, device and host of this rank, as JSON holds it. No communication."""
    return {
        "host": describe_place(session),
        "versions": find_versions(),
        "device": describe_device(session.device),
        "launcher": session.ranks.launcher,
    }


def describe_place(session: Session) -> dict[str, Any]:
    """The host of a rank: name, ranks, cores that it may use, memory in GiB, network interfaces
    that are up, fabric ports, NUMA nodes, GPUs that NVLink joins."""
    host = describe_host()
    return {
        "name": host.name,
        "ranks": session.ranks.local_world,
        "cores": len(host.cpus),
        "memory_gib": round(_host_bytes() / _GIB, 1),
        "interfaces": [
            {"name": i.name, "mbits": i.speed_mbits}
            for i in host.interfaces
            if i.up and not i.loopback
        ],
        "fabric": [
            {"name": f"{port.device}:{port.port}", "gbits": port.rate_gbits}
            for port in host.fabric
            if port.active
        ],
        "numa_nodes": len(host.numa),
        "nvlink_domain": host.nvlink_domain,
    }


def node_size(session: Session) -> int:
    """Consecutive ranks that share a node's fast links."""
    world = session.ranks.world
    if session.topology is not None:
        return session.topology.ranks_per_node(world)
    return ranks_per_node(world)


def find_versions() -> dict[str, str]:
    """Versions of what ranks must have in common; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, nccl.version()))
        found["cudnn"] = str(torch.backends.cudnn.version())
    if _DRIVER.is_file() and (match := re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", _text())):
        found["driver"] = match[1]
    return found


def _text() -> str:
    return _DRIVER.read_text(encoding="utf-8", errors="replace")


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, memory in GiB, multiprocessors (on a CPU: threads of the rank), compute capability."""
    if device.type != "cuda":
        return {
            "type": "cpu",
            "name": cpu_name(),
            "memory_gib": round(_host_bytes() / _GIB, 1),
            "cores": torch.get_num_threads(),
            "capability": "",
        }
    found = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": found.name,
        "memory_gib": round(found.total_memory / _GIB, 1),
        "cores": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
    }


def compare_ranks(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each version and device of a rank that differs from rank 0's."""
    lines = []
    first = facts[0]
    # Drivers keep back unequal parts of memory; a host's cores may not divide evenly.
    free = ("memory_gib",) if first["device"]["type"] == "cuda" else ("memory_gib", "cores")
    for rank, mine in enumerate(facts):
        for part in ("versions", "device"):
            names = sorted(first[part].keys() | mine[part].keys())
            for name in names:
                want, have = first[part].get(name, "none"), mine[part].get(name, "none")
                if want != have and name not in free:
                    host = mine["host"]["name"]
                    lines.append(f"rank {rank} (host {host}): {name} {have}, rank 0 has {want}")
    return lines


def uneven_hosts(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line where hosts hold different numbers of ranks; plans then take smaller nodes."""
    sizes = sorted({mine["host"]["ranks"] for mine in facts})
    if len(sizes) == 1:
        return []
    return [f"hosts hold different numbers of ranks: {', '.join(map(str, sizes))}"]


def _host_bytes() -> int:
    """Memory of this host; 0 where the system does not tell."""
    try:
        return int(_MEMORY.read_text().split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
