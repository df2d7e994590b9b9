"""Paths: what is found, that slots are written whole, and which error each trouble becomes."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from job.errors import ConfigError, DataError, DeniedError, NotFoundError, ResourcesError, UnavailableError
from job.storage import open_store
from job.storage.local import LocalStore

SETTING = "SFT_DATA__URI"
NOBODY = 65534


def store(uri: object) -> LocalStore:
    opened = open_store(str(uri), setting=SETTING)
    assert isinstance(opened, LocalStore)
    return opened


def names(uri: object) -> list[str]:
    return [file.path for file in store(uri).find()]


def ignore(size_bytes: int) -> None:
    pass


@contextmanager
def as_nobody() -> Iterator[None]:
    """Drop root for a while: root may read and write everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that every user can reach."""
    folder = Path("/tmp") / f"sft-test-{os.getpid()}"
    folder.mkdir(mode=0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.jsonl", "b.txt", "sub/c.jsonl", "sub/deep/d.jsonl", ".hidden", ".git/e.jsonl"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "tree"


class TestFind:
    def test_one_file(self, tree: Path) -> None:
        (file,) = store(tree / "a.jsonl").find()
        assert (file.uri, file.path, file.size_bytes) == (str(tree / "a.jsonl"), "a.jsonl", 7)

    def test_folder_without_hidden_files(self, tree: Path) -> None:
        assert names(tree) == ["a.jsonl", "b.txt", "sub/c.jsonl", "sub/deep/d.jsonl"]

    @pytest.mark.parametrize(
        ("glob", "expected"),
        [
            ("*.jsonl", ["a.jsonl"]),
            ("*", ["a.jsonl", "b.txt"]),
            ("**/*.jsonl", ["a.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl"]),
            ("*/*.jsonl", ["sub/c.jsonl"]),
            ("sub/[cd].jsonl", ["c.jsonl"]),
            ("sub/**", ["c.jsonl", "deep/d.jsonl"]),
            (".git/*.jsonl", ["e.jsonl"]),
        ],
    )
    def test_globs(self, tree: Path, glob: str, expected: list[str]) -> None:
        assert names(f"{tree}/{glob}") == expected

    def test_relative_glob_and_home(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tree)
        assert names("*.jsonl") == ["a.jsonl"]
        monkeypatch.setenv("HOME", str(tree))
        assert names("~/b.txt") == ["b.txt"]

    def test_links_are_followed_once(self, tree: Path) -> None:
        (tree / "sub" / "up").symlink_to(tree)
        other = tree.parent / "other"
        other.mkdir()
        (other / "z.jsonl").touch()
        (tree / "other").symlink_to(other)
        assert names(tree) == ["a.jsonl", "b.txt", "other/z.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl"]

    @pytest.mark.parametrize("name", ["missing", "missing/*.jsonl", "*.parquet", ".git/nothing-*"])
    def test_nothing_there(self, tree: Path, name: str) -> None:
        with pytest.raises(NotFoundError, match=f"{SETTING}={tree}") as caught:
            store(f"{tree}/{name}").find()
        assert caught.value.hint

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="holds no files"):
            store(tmp_path).find()

    def test_unreadable_folder_is_not_taken_for_empty(self, open_folder: Path) -> None:
        (open_folder / "closed").mkdir(mode=0o000)
        (open_folder / "open.jsonl").touch()
        with as_nobody(), pytest.raises(DeniedError, match="closed"):
            store(open_folder).find()


class TestFetch:
    def test_in_place(self, tree: Path, tmp_path: Path) -> None:
        opened = store(tree)
        into = tmp_path / "into"
        assert opened.fetch(opened.find(), into, ignore)[0] == tree / "a.jsonl"
        assert not into.exists()

    def test_changed_after_find(self, tree: Path, tmp_path: Path) -> None:
        opened = store(tree / "a.jsonl")
        files = opened.find()
        (tree / "a.jsonl").write_text("longer than before")
        with pytest.raises(UnavailableError, match="changed while being read"):
            opened.fetch(files, tmp_path, ignore)

    def test_unreadable_file(self, open_folder: Path, tmp_path: Path) -> None:
        (open_folder / "a.jsonl").write_text("x")
        (open_folder / "a.jsonl").chmod(0)
        opened = store(open_folder)
        files = opened.find()
        with as_nobody(), pytest.raises(DeniedError, match="Permission denied"):
            opened.fetch(files, tmp_path, ignore)

    def test_revision_is_the_contents(self, tree: Path) -> None:
        opened = store(tree)
        before = opened.revision(opened.find())
        os.utime(tree / "a.jsonl", (1, 1))
        assert opened.revision(opened.find()) == before
        (tree / "a.jsonl").write_text("A.jsonl")
        assert opened.revision(opened.find()) != before


class TestSlot:
    def test_put_read_delete(self, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(b"content")
        opened = store(tmp_path / "slot")
        assert opened.read("sub/a") is None
        opened.put(tmp_path / "source", "sub/a")
        opened.put(tmp_path / "source", "sub/a")
        assert opened.read("sub/a") == b"content"
        assert names(tmp_path / "slot") == ["sub/a"]
        opened.delete("sub/a")
        opened.delete("sub/a")
        assert opened.read("sub/a") is None

    @pytest.mark.parametrize("path", ["../a", "/etc/a", "a/../../b", ""])
    def test_nothing_outside_the_slot(self, tmp_path: Path, path: str) -> None:
        (tmp_path / "source").touch()
        with pytest.raises(DataError):
            store(tmp_path / "slot").put(tmp_path / "source", path)

    def test_delete_leaves_no_empty_folders(self, tmp_path: Path) -> None:
        (tmp_path / "source").touch()
        opened = store(tmp_path / "slot")
        for path in ("a/b/c", "a/d"):
            opened.put(tmp_path / "source", path)
        opened.delete("a/b/c")
        assert not (tmp_path / "slot" / "a" / "b").exists()
        assert names(tmp_path / "slot") == ["a/d"]
        opened.delete("a/d")
        assert list((tmp_path / "slot").iterdir()) == []  # the slot itself stays

    def test_swap_writes_only_what_is_still_of_that_version(self, tmp_path: Path) -> None:
        opened = store(tmp_path / "slot")
        assert opened.read_version("sub/a") is None
        assert opened.swap("sub/a", b"1", "other") is None
        assert not (tmp_path / "slot").exists()
        first = opened.swap("sub/a", b"1", None)
        assert first is not None
        assert opened.read_version("sub/a") == (b"1", first)
        assert opened.swap("sub/a", b"2", None) is None
        second = opened.swap("sub/a", b"2", first)
        assert second not in (None, first)
        assert opened.swap("sub/a", b"3", first) is None
        assert opened.read_version("sub/a") == (b"2", second)
        opened.delete("sub/a")
        assert opened.swap("sub/a", b"3", second) is None
        assert list((tmp_path / "slot").iterdir()) == []

    def test_swap_where_there_are_no_hard_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: Path, target: Path) -> None:
            raise PermissionError(errno.EPERM, "as a network share says")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
        opened = store(tmp_path / "slot")
        first = opened.swap("a", b"1", None)
        assert opened.read_version("a") == (b"1", first)
        assert opened.swap("a", b"2", None) is None
        assert [path.name for path in (tmp_path / "slot").iterdir()] == ["a"]

    def test_of_racing_processes_one_is_first(self, tmp_path: Path) -> None:
        # Each of 4 processes writes only what follows on what it read, 50 times: no number is skipped or lost.
        program = """if True:
            import sys
            from job.storage import open_store
            opened, name = open_store(sys.argv[1], setting="X"), sys.argv[2]
            for mine in range(50):
                while True:
                    found = opened.read_version("a/count")
                    content, version = (b"", None) if found is None else found
                    if opened.swap("a/count", content + f"{name}{mine} ".encode(), version):
                        break
            """
        command = [sys.executable, "-c", program, str(tmp_path / "slot")]
        racers = [subprocess.Popen([*command, name]) for name in "abcd"]
        assert [racer.wait(60) for racer in racers] == [0] * 4
        written = (tmp_path / "slot" / "a" / "count").read_text().split()
        assert sorted(written) == sorted(f"{name}{mine}" for name in "abcd" for mine in range(50))
        assert names(tmp_path / "slot") == ["a/count"]

    def test_starts_at_the_same_moment_find_the_slot_writable(self, tmp_path: Path) -> None:
        program = """if True:
            import sys
            from pathlib import Path
            from job.storage import open_store
            opened = open_store(sys.argv[1], setting="X")
            for _ in range(100):
                opened.check_writable()
                opened.put(Path(sys.argv[2]), "sub/" + sys.argv[3])
                opened.delete("sub/" + sys.argv[3])
            """
        (tmp_path / "source").touch()
        command = [sys.executable, "-c", program, str(tmp_path / "runs" / "slot"), str(tmp_path / "source")]
        racers = [subprocess.Popen([*command, name]) for name in "abcd"]
        assert [racer.wait(60) for racer in racers] == [0] * 4

    def test_probe_leaves_nothing(self, tmp_path: Path) -> None:
        store(tmp_path / "runs" / "1").check_writable()
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "here").mkdir()
        store(tmp_path / "here").check_writable()
        assert list(tmp_path.rglob("*")) == [tmp_path / "here"]

    def test_refused(self, open_folder: Path) -> None:
        opened = store(open_folder / "slot")
        (open_folder / "slot").mkdir(mode=0o555)
        with as_nobody(), pytest.raises(DeniedError, match=f"may not write in {open_folder}/slot"):
            opened.check_writable()

    def test_slot_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match="can't be written below"):
            store(tmp_path / "file").check_writable()

    def test_full_disk(self, tmp_path: Path) -> None:
        # A file system of 1 MiB in a namespace of its own; needs unprivileged user namespaces, or root.
        (tmp_path / "source").write_bytes(os.urandom(2 * 2**20))
        (tmp_path / "slot").mkdir()
        code = (
            "import sys; from pathlib import Path; from job.storage import open_store\n"
            "from job.errors import ResourcesError\n"
            "try: open_store('slot', setting='SFT_OUTPUT__URI').put(Path('source'), 'a')\n"
            "except ResourcesError as error: print(error, list(Path('slot').iterdir()))"
        )
        script = 'mount -t tmpfs -o size=1m tmpfs slot && exec "$0" -c "$1"'
        namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
        command = [*namespace, "sh", "-c", script, sys.executable, code]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        if "unshare" in ran.stderr or "mount" in ran.stderr:
            pytest.skip(f"no namespaces here: {ran.stderr.strip()}")
        assert "SFT_OUTPUT__URI=slot: no space left in slot" in ran.stdout, ran.stderr
        assert ran.stdout.rstrip().endswith("[]")
        assert ResourcesError.exit_code.code == 71


def test_empty_uri() -> None:
    with pytest.raises(ConfigError, match=SETTING):
        store("")
