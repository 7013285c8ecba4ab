"""`ccam-deploy batch` on Ray: its rows, what is lost when it is killed (nothing), its endings."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import ccam_deploy as ccam
from ccam_deploy.image_files import load_image
from tests.helpers import ROOT, example_files
from tests.scale.test_inputs import write_shard

pytestmark = [pytest.mark.scale, pytest.mark.slow]

COMMAND = [sys.executable, "-m", "ccam_deploy", "batch"]
TWO = ["--processes", "2", "--backend", "onnxruntime-cpu"]
LIMIT_S = 300
COPIES = 6
STEP = 2.0**-11
"""Of half precision below 1."""
Maps = dict[tuple[str, int | None], tuple[Any, ...]]


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=LIMIT_S)
    return process.returncode, stdout, stderr


def success(*words: object) -> str:
    """What a run prints that ends well, and says nothing on stderr."""
    code, stdout, stderr = finish(start(*words))
    assert (code, stderr) == (0, ""), stdout + stderr
    return stdout


def failure(*words: object) -> str:
    code, stdout, stderr = finish(start(*words))
    assert (code, stdout) == (2, ""), stdout + stderr
    (line,) = stderr.splitlines()
    return line


def rows(folder: Path) -> Maps:
    """All facts of each row, the map as bytes, by key and class. None comes twice."""
    from pyarrow import parquet

    table = parquet.read_table(folder)
    maps = table["saliency"].combine_chunks().storage
    found: Maps = {}
    columns = table.drop_columns(["saliency"]).to_pylist()
    for row, saliency in zip(columns, maps, strict=True):
        name = row["key"], row["class_index"]
        assert name not in found
        values = saliency.as_py()
        pixels = None if values is None else np.array(values, np.float16).tobytes()
        facts = {**row, "settings": row["settings"] and json.loads(row["settings"])}
        found[name] = (json.dumps(facts, sort_keys=True), pixels)
    return found


def pixels_of(stored: bytes) -> Any:
    return np.frombuffer(stored, np.float16).astype(np.float32)


def require_same(found: Maps, expected: Maps) -> None:
    """All rows and facts are equal, and maps to a step of half precision.

    Images are explained beside others in one run than in another, and their masks share forwards.
    """
    assert found.keys() == expected.keys()
    for name, (facts, pixels) in found.items():
        one, other = json.loads(facts), json.loads(expected[name][0])
        assert one.pop("score") == pytest.approx(other.pop("score"), abs=1e-6)
        assert one == other
        same = expected[name][1]
        assert (pixels is None) == (same is None)
        if pixels is not None:
            np.testing.assert_allclose(pixels_of(pixels), pixels_of(same), atol=STEP)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """When each part was written, and where it lies on the disk."""
    parts = folder.glob("part-*.parquet")
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in parts}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, many times, and a file that is none."""
    folder = tmp_path_factory.mktemp("input") / "images"
    for number in range(COPIES):
        (folder / f"{number:02}").mkdir(parents=True)
        for file in example_files():
            shutil.copy(file, folder / f"{number:02}" / file.name)
    (folder / "03" / "broken.png").write_bytes(example_files()[0].read_bytes()[:300])
    (folder / "notes.txt").touch()
    return folder


@pytest.fixture(scope="module")
def whole(images: Path, digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run writes that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "out"
    before = set(Path("/tmp").glob("ccam-ray-*"))
    stdout = success(digits_bundle, images, output, *TWO, "--part-size", 8)
    lines = stdout.splitlines()
    count = COPIES * len(example_files()) + 1
    assert re.fullmatch(
        rf"{re.escape(str(output))}: all {count} images have their rows; {count} now, [\d.]+ a "
        "second on onnxruntime-cpu",
        lines[0],
    )
    assert lines[1:] == ["1 of them have an error instead of a map; see the column error"]
    assert set(Path("/tmp").glob("ccam-ray-*")) == before
    return output


def test_rows_are_the_explainer_s(whole: Path, images: Path, digits_bundle: Path) -> None:
    """To a step of half precision: images share forwards with others here."""
    found = rows(whole)
    assert len(found) == COPIES * len(example_files()) + 1
    broken = json.loads(found.pop(("03/broken.png", None))[0])
    assert broken.pop("error").startswith("03/broken.png cannot be decoded: ")
    assert set(broken.values()) == {"03/broken.png", None}
    with ccam.load(digits_bundle, backend="onnxruntime-cpu", threads=1) as explainer:
        result = explainer.explain([load_image(file) for file in example_files()])
        for (key, target), (facts, pixels) in found.items():
            assert target is not None
            pair = [file.name for file in example_files()].index(Path(key).name)
            row = json.loads(facts)
            assert target == result.targets[pair]
            assert row["class_name"] == explainer.bundle.manifest.label(target)
            assert row["score"] == pytest.approx(result.probability(pair), abs=1e-6)
            assert row["settings"] == json.loads(json.dumps(result.settings))
            assert (row["path"], row["error"]) == (key, None)
            np.testing.assert_allclose(pixels_of(pixels), result.saliency[pair].ravel(), atol=STEP)


def test_maps_are_read_as_the_guide_says(whole: Path) -> None:
    page = (ROOT / "docs" / "batches.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(code.replace("explained", str(whole)), names)
    shape = (COPIES * len(example_files()), 96, 96)
    assert (names["maps"].shape, names["maps"].dtype) == (shape, np.float16)
    assert names["maps"].max() == 1


def test_a_finished_batch_is_left_alone(whole: Path, images: Path, digits_bundle: Path) -> None:
    before = files(whole)
    code, stdout, stderr = finish(start(digits_bundle, images, whole, *TWO, "--json"))
    assert code == 0
    count = COPIES * len(example_files()) + 1
    assert stderr == f"continuing after {count} of {count} images\n"
    facts = json.loads(stdout)
    assert (facts["images"], facts["explained_now"], facts["rows_now"]) == (count, 0, 0)
    assert files(whole) == before


def test_other_settings_do_not_mix(whole: Path, images: Path, digits_bundle: Path) -> None:
    line = failure(digits_bundle, images, whole, "--method", "grad-cam")
    assert line.startswith(
        f'error: {whole} holds rows with method "collection-cam", and this command has "grad-cam"; '
    )
    line = failure(digits_bundle, images, whole, "--target", "top2")
    assert "holds rows with targets " in line


@contextmanager
def running(*words: object) -> Iterator[subprocess.Popen[str]]:
    """A run that has kept some parts, and is ended whatever becomes of the test."""
    with start(*words) as process:
        try:
            output = Path(str(words[2]))
            deadline = time.monotonic() + LIMIT_S
            while len(files(output)) < 3:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


def survivors(processes: list[psutil.Process]) -> list[list[str]]:
    """Commands of the processes that do not end soon.

    One that nobody has asked for its exit status has ended, too.
    """

    def runs(process: psutil.Process) -> bool:
        try:
            return bool(process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    def command(process: psutil.Process) -> list[str]:
        try:
            return list(process.cmdline())
        except psutil.NoSuchProcess:
            return []

    commands = [(process, command(process)) for process in processes]
    deadline = time.monotonic() + 60
    while any(map(runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [words for process, words in commands if runs(process)]


def test_killed_in_the_middle(
    whole: Path, images: Path, digits_bundle: Path, tmp_path: Path
) -> None:
    """The next run explains what is missing, and nothing else; the rows are those of one run."""
    words = [digits_bundle, images, tmp_path / "out", *TWO, "--part-size", 2]
    with running(*words) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        (folder,) = Path("/tmp").glob("ccam-ray-*")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert survivors(children) == []
    assert not folder.exists()
    kept = files(tmp_path / "out")
    some = rows(tmp_path / "out")
    complete = rows(whole)
    assert 0 < len(some) < len(complete)
    code, stdout, stderr = finish(start(*words, "--json"))
    assert code == 0, stderr
    assert stderr == f"continuing after {len(some)} of {len(complete)} images\n"
    facts = json.loads(stdout)
    assert facts["explained_now"] + facts["failed_now"] == len(complete) - len(some)
    assert files(tmp_path / "out").items() >= kept.items()
    require_same(rows(tmp_path / "out"), complete)
    assert not list((tmp_path / "out").glob(".part-*"))


def addresses(processes: list[psutil.Process]) -> set[str]:
    """Where processes listen."""
    return {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def test_terminated(whole: Path, images: Path, digits_bundle: Path, tmp_path: Path) -> None:
    """Until then it listened to this machine alone."""
    words = [digits_bundle, images, tmp_path / "out", *TWO, "--part-size", 2]
    with running(*words) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        listening = addresses([psutil.Process(process.pid), *children])
        process.send_signal(signal.SIGTERM)
        code, stdout, stderr = finish(process)
    assert "127.0.0.1" in {address.removeprefix("::ffff:") for address in listening}
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert (code, stdout) == (143, "")
    told, last = stderr.strip().splitlines()
    kept = rows(tmp_path / "out")
    assert last == "error: terminated; nothing was left half-written"
    assert told == (
        f"{len(kept)} of {len(rows(whole))} images are in {tmp_path / 'out'} now; the same command "
        "continues there"
    )
    assert not list((tmp_path / "out").glob(".part-*"))
    assert survivors(children) == []


def test_terminated_while_ray_starts(images: Path, digits_bundle: Path, tmp_path: Path) -> None:
    process = start(digits_bundle, images, tmp_path / "out", *TWO)
    while not any("gcs_server" in child.name() for child in psutil.Process(process.pid).children()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    code, stdout, stderr = finish(process)
    assert (code, stdout) == (143, "")
    assert stderr.strip().splitlines()[-1] == "error: terminated; nothing was left half-written"
    assert "Traceback" not in stderr
    assert survivors(children) == []


def test_a_killed_worker_is_replaced(
    whole: Path, images: Path, digits_bundle: Path, tmp_path: Path
) -> None:
    with running(digits_bundle, images, tmp_path / "out", *TWO, "--part-size", 2) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        worker = next(child for child in children if "MapWorker" in " ".join(child.cmdline()))
        worker.kill()
        code, _, stderr = finish(process)
    assert (code, stderr) == (0, "")
    require_same(rows(tmp_path / "out"), rows(whole))


def test_shards_and_parquet(whole: Path, images: Path, digits_bundle: Path, tmp_path: Path) -> None:
    """The same maps from either, for two classes of an image."""
    import pyarrow
    from pyarrow import parquet

    named = {f"{n}/{file.name}": file.read_bytes() for n in range(2) for file in example_files()}
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "0.tar", named)
    table = pyarrow.table({"jpg": list(named.values()), "path": list(named)})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=5)
    words = [*TWO, "--target", "top2", "--part-size", 6, "--limit", 11]
    success(digits_bundle, tmp_path / "shards", tmp_path / "a", *words)
    success(digits_bundle, tmp_path / "in.parquet", tmp_path / "b", *words, "--image-column", "jpg")
    first, second = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert len(first) == len(second) == 2 * 11
    names = list(named)
    for (key, target), (facts, pixels) in first.items():
        path = key.removeprefix("0.tar/")
        other, same = second[f"in.parquet#{names.index(path)}", target]
        np.testing.assert_allclose(pixels_of(same), pixels_of(pixels), atol=STEP)
        assert json.loads(other)["path"] == path
        assert json.loads(facts)["path"] == key
    tops = {(Path(key).name, target): pixels for (key, target), (_, pixels) in rows(whole).items()}
    shown = {(Path(key).name, target): pixels for (key, target), (_, pixels) in first.items()}
    both = tops.keys() & shown.keys()
    assert len(both) == len({name for name, _ in shown})
    for name in both:
        np.testing.assert_allclose(pixels_of(shown[name]), pixels_of(tops[name]), atol=STEP)


def test_what_an_engine_refuses_is_one_line(
    images: Path, digits_bundle: Path, tmp_path: Path
) -> None:
    words = [digits_bundle, images, tmp_path / "out", *TWO, "--method", "integrated-gradients"]
    line = failure(*words)
    assert line == "error: the bundle has no input_gradient graph; export it with --gradients"
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_gpus_for_a_backend_that_uses_none(
    images: Path, digits_bundle: Path, tmp_path: Path
) -> None:
    words = [digits_bundle, images, tmp_path / "out"]
    line = failure(*words, "--num-gpus", "1", "--backend", "onnxruntime-cpu")
    assert line == "error: --num-gpus is 1, but --backend onnxruntime-cpu uses none"
    line = failure(*words, "--num-gpus", "0", "--backend", "onnxruntime-cuda")
    assert line == "error: --backend onnxruntime-cuda needs a GPU, and the processes get none"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster that was there before."""
    place, port = tmp_path_factory.mktemp("r"), free_port()
    code = (
        "import ray, sys\n"
        "from ray.cluster_utils import Cluster\n"
        "head = {'num_cpus': 3, 'gcs_server_port': int(sys.argv[1]), 'include_dashboard': False}\n"
        "cluster = Cluster(initialize_head=True, head_node_args=head)\n"
        "print(cluster.address, flush=True)\n"
        "sys.stdin.read()\n"
        "cluster.shutdown()\n"
    )
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(port), str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate(timeout=60)


def test_on_a_cluster_that_is_there(
    whole: Path, images: Path, digits_bundle: Path, tmp_path: Path, cluster: str
) -> None:
    words = [digits_bundle, images, tmp_path / "out", "--backend", "onnxruntime-cpu"]
    line = failure(*words, "--address", cluster, "--processes", "3")
    assert "the cluster has 3 CPUs; 3 processes, and a CPU that decodes images, need 4" in line
    success(*words, "--address", cluster)
    require_same(rows(tmp_path / "out"), rows(whole))


def test_no_cluster(images: Path, digits_bundle: Path, tmp_path: Path) -> None:
    words = [digits_bundle, images, tmp_path / "out", "--address"]
    line = failure(*words, f"127.0.0.1:{free_port()}")
    assert line.startswith("error: there is no Ray cluster at 127.0.0.1:")
    assert "there is no Ray cluster at a..b:6379: " in failure(*words, "a..b:6379")
    assert "is not HOST:PORT; to use a cluster from outside" in failure(*words, "ray://host:10001")
