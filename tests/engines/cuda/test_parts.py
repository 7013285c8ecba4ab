"""Images in parts: copied, cut, and given their maps, as an array of all of them would be."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ccam_deploy.arrays import Floats
from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.cuda.parts import ImagePart, ImageParts
from tests.engines.cuda.host_device import HostDevice

FLOAT = np.dtype(np.float32)


def room(device: HostDevice, *shape: int) -> DeviceTensor:
    return DeviceTensor(device.allocate(4 * int(np.prod(shape))), shape, FLOAT)


def read(device: HostDevice, tensor: DeviceTensor) -> Floats:
    values = np.empty(tensor.shape, np.float32)
    device.download(values, tensor.address)
    return values


def parts_of(device: HostDevice, images: Floats, counts: list[tuple[int, bool]]) -> ImageParts:
    """The images in parts of so many, in device memory with room for maps, or on the host."""
    parts, start = [], 0
    for count, there in counts:
        values = images[start : start + count]
        start += count
        if there:
            tensor = room(device, *values.shape)
            device.upload(tensor.address, np.ascontiguousarray(values))
            parts.append(ImagePart(tensor, room(device, count, *values.shape[2:])))
        else:
            parts.append(ImagePart(values))
    return ImageParts(tuple(parts))


counted = st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=4)


@given(counted, st.integers(0, 12), st.integers(0, 12))
def test_slices_are_those_of_the_array(
    counts: list[tuple[int, bool]], start: int, stop: int
) -> None:
    device, total = HostDevice(), sum(count for count, _ in counts)
    images = np.random.default_rng(0).standard_normal((total, 1, 2, 3), np.float32)
    whole = parts_of(device, images, counts)
    assert len(whole) == total
    part = whole[start:stop]
    wanted = images[start:stop]
    assert len(part) == len(wanted)
    if not part.parts:
        return
    on_host = part.on_host()
    assert on_host is None or (on_host == wanted).all()
    assert (part.fetch(device) == wanted).all()
    target = room(device, len(part) + 1, 1, 2, 3)
    part.put(device, target)
    assert (read(device, target)[: len(part)] == wanted).all()


@given(counted, st.booleans())
def test_maps_go_where_their_images_are(counts: list[tuple[int, bool]], there: bool) -> None:
    device, total = HostDevice(), sum(count for count, _ in counts)
    images = parts_of(device, np.zeros((total, 1, 2, 3), np.float32), counts)
    maps = np.random.default_rng(1).standard_normal((total, 2, 3), np.float32)
    shown: DeviceTensor | Floats = maps
    if there:
        shown = room(device, total, 6)
        device.upload(shown.address, maps)
    images.give(device, shown)
    start = 0
    for part in images.parts:
        if part.maps is not None:
            assert (read(device, part.maps) == maps[start : start + len(part)]).all()
        start += len(part)
