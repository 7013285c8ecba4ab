"""Images in parts, of which some lie in a GPU's memory, where their maps are to go too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccam_deploy.arrays import Floats
from ccam_deploy.engines.cuda.device import Device, DeviceTensor


@dataclass(frozen=True)
class ImagePart:
    """Some images that lie together.

    Attributes:
        images: [N, C, H, W] float32, preprocessed: on the host, or in the memory of the GPU.
        maps: [N, H, W] float32 in the memory of the GPU, where their maps are put; or None.
    """

    images: Floats | DeviceTensor
    maps: DeviceTensor | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    def rows(self, start: int, stop: int) -> ImagePart:
        """Keep some of the images."""
        count = stop - start
        return ImagePart(
            self.images.rows(count, start)
            if isinstance(self.images, DeviceTensor)
            else self.images[start:stop],
            None if self.maps is None else self.maps.rows(count, start),
        )


@dataclass(frozen=True)
class ImageParts:
    """Images in parts; a slice of them is the same of some images."""

    parts: tuple[ImagePart, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, rows: slice) -> ImageParts:
        first, last, _ = rows.indices(len(self))
        kept, start = [], 0
        for part in self.parts:
            begin, end = max(first - start, 0), min(last - start, len(part))
            if begin < end:
                kept.append(part.rows(begin, end))
            start += len(part)
        return ImageParts(tuple(kept))

    def on_host(self) -> Floats | None:
        """Give the images as one array; None where some are in the memory of the GPU."""
        arrays = [part.images for part in self.parts if not isinstance(part.images, DeviceTensor)]
        if len(arrays) < len(self.parts):
            return None
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def put(self, device: Device, target: DeviceTensor) -> None:
        """Put copies of the images into device memory on the stream.

        Args:
            device: Whose memory and stream.
            target: [B, C, H, W] float32 with room for all of them.
        """
        start = 0
        for part in self.parts:
            place = target.rows(len(part), start)
            if isinstance(part.images, DeviceTensor):
                device.copy(place.address, part.images.address, place.bytes)
            else:
                _upload(device, place.address, part.images)
            start += len(part)

    def fetch(self, device: Device) -> Floats:
        """Copy the images to the host, and wait."""
        arrays = []
        for part in self.parts:
            if isinstance(part.images, DeviceTensor):
                arrays.append(np.empty(part.images.shape, np.float32))
                device.download(arrays[-1], part.images.address)
            else:
                arrays.append(part.images)
        device.wait()
        return np.concatenate(arrays)

    def give(self, device: Device, maps: DeviceTensor | Floats) -> None:
        """Put copies of the maps where they are to go, on the stream.

        Args:
            device: Whose memory and stream.
            maps: A row of float32 for each image, in device memory or on the host.
        """
        start = 0
        for part in self.parts:
            stop = start + len(part)
            if part.maps is None:
                pass
            elif isinstance(maps, DeviceTensor):
                source = maps.rows(len(part), start)
                device.copy(part.maps.address, source.address, part.maps.bytes)
            else:
                _upload(device, part.maps.address, maps[start:stop])
            start = stop


def _upload(device: Device, address: int, values: Floats) -> None:
    """Put values into device memory on the stream; a copy of them stays until that is done."""
    contiguous = np.ascontiguousarray(values)
    device.upload(address, contiguous)
    if contiguous is not values:
        device.wait()


SlotImages = Floats | ImageParts
"""What a slot takes: [B, C, H, W] float32, or the same in parts."""
