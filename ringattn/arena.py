"""Memory of runs: one buffer that every run carves its tensors from."""

import torch


class Arena:
    """One growing buffer from which a run carves its slots and messages; reused by every run.

    A run's tensors are valid until the next run that uses the same arena. On CUDA a buffer belongs
    to the stream that it was made on, whose order keeps runs apart: a run on another stream gets a
    new one.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._owner: tuple[torch.device, torch.cuda.Stream | None] | None = None
        self._used = 0
        self._wanted = 0

    def reset(self, device: torch.device) -> None:
        """Starts a new run on the current stream. Grows to what the last run wanted."""
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if self._owner != (device, stream) or self._buffer.numel() < self._wanted:
            # Empty first: the old buffer is free before the new one is made.
            self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
            self._buffer = torch.empty(self._wanted, dtype=torch.uint8, device=device)
            self._owner = (device, stream)
        self._used = self._wanted = 0

    def take(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """An uninitialised tensor; from the heap when the buffer is full."""
        count = 1
        for n in shape:
            count *= n
        size = count * dtype.itemsize
        padded = -(-size // 64) * 64
        self._wanted += padded
        if self._used + padded > self._buffer.numel():
            return torch.empty(shape, dtype=dtype, device=device)
        part = self._buffer[self._used : self._used + size]
        self._used += padded
        return part.view(dtype).view(shape)
