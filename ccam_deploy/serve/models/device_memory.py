"""Memory of the GPU for maps that stay there, and reading of what is in it."""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np

from ccam_deploy.arrays import Floats
from ccam_deploy.engines.cuda.device import Device, DeviceTensor


class DeviceMemory:
    """Lends memory of the GPU; what comes back is lent again. Safe to use from several threads.

    Args:
        device: Whose memory; closed with this.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._free: dict[int, list[int]] = defaultdict(list)
        # The garbage collector may give memory back in the middle of another call of this thread.
        self._lock = threading.RLock()

    def take(self, shape: tuple[int, ...]) -> DeviceTensor:
        """Lend memory for a tensor of float32.

        Raises:
            BackendError: There is too little.
        """
        tensor = DeviceTensor(0, shape, np.dtype(np.float32))
        with self._lock, self._device.current():
            free = self._free[tensor.bytes]
            address = free.pop() if free else self._device.allocate(tensor.bytes)
        return DeviceTensor(address, shape, tensor.dtype)

    def give_back(self, tensor: DeviceTensor) -> None:
        """Take memory back, which nobody reads any more."""
        with self._lock:
            self._free[tensor.bytes].append(tensor.address)

    def read(self, tensor: DeviceTensor) -> Floats:
        """Copy a tensor to the host."""
        values = np.empty(tensor.shape, tensor.dtype)
        with self._lock, self._device.current():
            self._device.download(values, tensor.address)
            self._device.wait()
        return values

    def close(self) -> None:
        """Free the memory."""
        self._device.close()
