"""Files and folders appear whole or not at all, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ccam_deploy.errors import OptionError, OutputError
from ccam_deploy.files import (
    kept_from_others,
    replace_file,
    require_writable,
    staged_folder,
    write_file,
)
from tests.damage import contents, full_disk


def write(path: Path) -> None:
    write_file(path, b"new")


def replace(path: Path) -> None:
    replace_file(path, b"new")


@pytest.mark.parametrize("name", ["pipe", "link-to-pipe"])
@pytest.mark.parametrize("use", [require_writable, write, replace])
def test_pipes_and_devices_are_not_replaced_by_files(
    tmp_path: Path, name: str, use: Callable[[Path], None]
) -> None:
    """Nor is a link to one, such as /dev/stdout."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link-to-pipe").symlink_to("pipe")
    with pytest.raises(OutputError, match=rf"cannot write .*{name}: it is a device or a pipe"):
        use(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link-to-pipe").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_links_are_followed(tmp_path: Path) -> None:
    """Also one to a file, in a folder, that is not there yet."""
    (tmp_path / "map.png").write_bytes(b"old")
    for name, target in (("link", "map.png"), ("chain", "link"), ("dangling", "deep/map.png")):
        link = tmp_path / name
        link.symlink_to(target)
        require_writable(link)
        write_file(link, name.encode())
        assert link.is_symlink()
        assert (tmp_path / target).read_bytes() == name.encode()
    assert (tmp_path / "map.png").read_bytes() == b"chain"
    assert (tmp_path / "link").is_symlink()


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "map.png"
    write_file(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o644
    with full_disk(1000), pytest.raises(OutputError) as raised:
        write_file(path, bytes(2000))
    assert str(raised.value) == f"cannot write {path}: File too large"
    assert contents(tmp_path) == {"map.png": b"old"}
    write_file(path, bytes(2000))
    assert contents(tmp_path) == {"map.png": bytes(2000)}
    with pytest.raises(OutputError, match=r"cannot write .*deep: Is a directory"):
        write_file(path.parent, b"new")
    with pytest.raises(OutputError, match=r"cannot write .*b: "):
        write_file(path / "b", b"new")
    assert contents(tmp_path) == {"map.png": bytes(2000)}


def test_an_interrupted_file_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "map.png"
    path.write_bytes(b"old")

    def interrupt(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"new")
    assert contents(tmp_path) == {"map.png": b"old"}


def test_replacing_needs_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "deep" / "file", b"")
    assert not list(tmp_path.iterdir())


def test_a_staged_folder_takes_its_place(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "plans"
    for content in (b"first", b"second"):
        with staged_folder(place) as draft:
            assert draft.parent == place.parent
            assert not list(draft.iterdir())
            (draft / "backbone.plan").write_bytes(content)
        assert contents(tmp_path) == {"backbone.plan": content}
        assert list(place.parent.iterdir()) == [place]
    assert place.stat().st_mode & 0o777 == 0o755


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    for place in (tmp_path / "plans", tmp_path / "new" / "plans"):
        (tmp_path / "plans").mkdir(exist_ok=True)
        (tmp_path / "plans" / "backbone.plan").write_bytes(b"old")
        expected = pytest.raises(OSError, match="File too large")
        with expected, full_disk(1000), staged_folder(place) as draft:
            (draft / "backbone.plan").write_bytes(bytes(2000))
        assert contents(tmp_path) == {"backbone.plan": b"old"}
        assert [path.name for path in tmp_path.iterdir()] == ["plans"]


@pytest.mark.parametrize("other_disk", [False, True])
def test_a_folder_can_be_staged_outside_of_what_programs_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_disk: bool
) -> None:
    """Beside it, where folders can be renamed from there."""
    repository = tmp_path / "models"
    place = repository / "ccam"
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if other_disk and path.parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    for content in (b"old", b"new"):
        with staged_folder(place, repository) as draft:
            assert draft.parent == (repository if other_disk else tmp_path)
            (draft / "config.pbtxt").write_bytes(content)
        assert (place / "config.pbtxt").read_bytes() == content
        assert list(tmp_path.iterdir()) == [repository]
        assert list(repository.iterdir()) == [place]


def test_a_relative_place_stays_where_it_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with staged_folder(Path("plans")):
        os.chdir("elsewhere")
    assert (tmp_path / "plans").is_dir()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_writable(tmp_path / "a" / "b")
    require_writable(tmp_path / "file")
    assert contents(tmp_path) == {"file": b""}
    with pytest.raises(OutputError, match=r"cannot write .*: it is a folder"):
        require_writable(tmp_path)
    with pytest.raises(OutputError, match=r"cannot write .*c: Not a directory"):
        require_writable(tmp_path / "file" / "c")


def test_a_folder_is_kept_from_others_until_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with kept_from_others(folder, "taken"):
        with pytest.raises(OptionError, match=r"^taken$"), kept_from_others(folder, "taken"):
            pytest.fail("two have it")
        assert folder.exists()  # still the first one's
    assert not folder.exists()  # it was empty
    with kept_from_others(folder, "taken"):
        (folder / "file").touch()
    assert (folder / "file").exists()


def test_a_folder_that_goes_before_it_is_locked_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that had made it found it empty in the end."""
    folder = tmp_path / "a"
    monkeypatch.setattr(fcntl, "flock", lambda handle, how: folder.rmdir())
    with pytest.raises(OptionError, match=r"^taken$"), kept_from_others(folder, "taken"):
        pytest.fail("the folder is gone")
    monkeypatch.undo()
    folder.mkdir()
    monkeypatch.setattr(fcntl, "flock", lambda handle, how: renewed(folder))
    with pytest.raises(OptionError, match=r"^taken$"), kept_from_others(folder, "taken"):
        pytest.fail("it is another folder")


def renewed(folder: Path) -> None:
    folder.rename(folder.with_name("old"))
    folder.mkdir()


def test_an_empty_folder_of_the_user_stays(tmp_path: Path) -> None:
    with kept_from_others(tmp_path, "taken"):
        pass
    assert tmp_path.exists()


def test_a_folder_without_locks_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with kept_from_others(tmp_path / "a", "taken"):
        (tmp_path / "a" / "file").touch()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=r"^cannot write to .*/file/a: File exists$"),
        kept_from_others(tmp_path / "file" / "a", "taken"),
    ):
        pytest.fail("it is a file")
