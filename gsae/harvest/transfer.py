"""From the device to the host without a halt. In: tensors on the device. Out: their copies on the host, once they are waited for.

On a GPU copies run beside the computation, into page-locked memory: the main thread queues them and goes on, and only the thread that
needs the values waits. On a CPU a tensor is its own copy.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Wait = Callable[[], None]


class HostCopies:
    """Copies tensors from one device; one for each thread that computes there."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def start(self, tensors: list[Tensor]) -> tuple[list[Tensor], Wait]:
        """Begin to copy what the device's present work gives.

        Returns:
            The copies, which hold nothing yet, and a function that waits until they do.
        """
        stream = self._stream
        if stream is None:
            return tensors, lambda: None
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        copies = []
        with torch.cuda.stream(stream):
            for tensor in tensors:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies.append(copy.copy_(tensor, non_blocking=True))
                tensor.record_stream(stream)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(stream)
        return copies, done.synchronize
