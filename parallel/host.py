"""What this host is made of: GPUs and the links between them, NUMA nodes, network."""

import ctypes
import os
import platform
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ringattn.parallel.cores import NumaNode, read_numa_nodes
from ringattn.parallel.network import FabricPort, Interface, fabric_ports, network_interfaces

_NVLINK = 2  # NVML_P2P_CAPS_INDEX_NVLINK
_PCI = Path("/sys/bus/pci/devices")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU that this process sees.

    Attributes:
        index: torch's number. name, uuid: the driver's. memory_bytes: all of its memory.
        numa: NUMA node it hangs on; None where unknown.
    """

    index: int
    name: str
    uuid: str
    memory_bytes: int
    numa: int | None = None


@dataclass(frozen=True, kw_only=True)
class Host:
    """This host, as this process sees it.

    Attributes:
        name: host name. key: equal for processes of one host and network namespace alone.
        gpus: in torch's order. nvlink: sets of GPU indices that NVLink joins, each GPU in one;
            empty where the driver cannot be asked.
        numa: nodes with their cores. cpus: the CPUs that this process may use.
        interfaces, fabric: network interfaces; ports of InfiniBand and RoCE devices.
    """

    name: str
    key: str
    gpus: tuple[Gpu, ...]
    nvlink: tuple[tuple[int, ...], ...]
    numa: tuple[NumaNode, ...]
    cpus: frozenset[int]
    interfaces: tuple[Interface, ...]
    fabric: tuple[FabricPort, ...]

    @property
    def nvlink_domain(self) -> int:
        """GPUs of the largest set that NVLink joins; 0 without GPUs, 1 without NVLink."""
        return max((len(group) for group in self.nvlink), default=min(len(self.gpus), 1))


def describe_host() -> Host:
    """Looks at this host. Takes milliseconds, on a machine with GPUs CUDA's initialisation more."""
    gpus = visible_gpus()
    return Host(
        name=socket.gethostname(),
        key=host_key(),
        gpus=gpus,
        nvlink=nvlink_sets([gpu.uuid for gpu in gpus]),
        numa=read_numa_nodes(),
        cpus=usable_cpus(),
        interfaces=network_interfaces(),
        fabric=fabric_ports(),
    )


def host_key() -> str:
    """What processes share that run on one host and can reach each other over loopback."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        network = os.readlink("/proc/self/ns/net")
        return f"{socket.gethostname()} {boot.read_text(encoding='utf-8').strip()} {network}"
    except OSError:
        return socket.gethostname()


def cpu_name() -> str:
    """The processor's model; what Python knows of it where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def usable_cpus() -> frozenset[int]:
    """The CPUs that this process may use; all of the host where the system has no such sets."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cache_bytes() -> int:
    """Bytes of the largest CPU cache, as Linux tells; 32 MiB where it does not."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [
        int(text[:-1]) * units[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in units and text[:-1].isdecimal()
    ]
    return max(found, default=32 << 20)


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch sees, CUDA_VISIBLE_DEVICES applied."""
    if not torch.cuda.is_available():
        return ()
    return tuple(_gpu(index) for index in range(torch.cuda.device_count()))


def _gpu(index: int) -> Gpu:
    about = torch.cuda.get_device_properties(index)
    bus = f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"
    try:
        numa = int((_PCI / bus / "numa_node").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        numa = -1
    return Gpu(
        index=index,
        name=about.name,
        uuid=str(about.uuid),
        memory_bytes=about.total_memory,
        numa=numa if numa >= 0 else None,
    )


def nvlink_sets(
    uuids: Sequence[str], linked: Callable[[str, str], bool] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Which GPUs NVLink joins, directly, through switches or through each other.

    Args:
        uuids: of the GPUs.
        linked: whether two of them have a link; None asks NVIDIA's management library.

    Returns:
        Sets of indices into `uuids`; none where the library is missing.
    """
    linked = linked or (_ask_nvml() if uuids else None)
    if linked is None:
        return ()
    label = list(range(len(uuids)))
    for b in range(len(uuids)):
        for a in range(b):
            if label[a] != label[b] and linked(uuids[a], uuids[b]):
                label = [label[a] if one == label[b] else one for one in label]
    names = sorted(set(label))
    return tuple(tuple(i for i, one in enumerate(label) if one == name) for name in names)


def _ask_nvml() -> Callable[[str, str], bool] | None:
    """NVML's answer to whether two GPUs are joined by NVLink; None without the library."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None

    def handle(uuid: str) -> ctypes.c_void_p:
        found = ctypes.c_void_p()
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(found))
        return found

    def linked(a: str, b: str) -> bool:
        status, (first, second) = ctypes.c_int(-1), (handle(a), handle(b))
        if not first or not second:
            return False
        code = nvml.nvmlDeviceGetP2PStatus(first, second, _NVLINK, ctypes.byref(status))
        return code == 0 and status.value == 0

    return linked
