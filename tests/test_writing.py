"""Files appear whole or not at all."""

from pathlib import Path

import pytest

from difffit_peft.writing import whole_files, write


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fail(path: Path) -> None:
    path.write_text("half")
    raise OSError("no space left")


def test_a_file_is_written_with_the_folders_above_it(tmp_path):
    for text in ("first", "second"):  # the second takes the place of the first
        path = write(tmp_path / "a" / "b" / "file.txt", lambda partial, text=text: partial.write_text(text))
        assert path == tmp_path / "a" / "b" / "file.txt"
        assert contents(tmp_path) == {"a/b/file.txt": text}


def test_until_it_is_whole_it_has_another_name_beside_it(tmp_path):
    (tmp_path / "file.txt").write_text("before")

    def save(partial: Path) -> None:
        assert partial.parent.parent == tmp_path and partial.parent.name.startswith("partial-")
        assert partial.name == "file.txt"  # some libraries choose a format by it
        assert contents(tmp_path) == {"file.txt": "before"}
        partial.write_text("after")

    write(tmp_path / "file.txt", save)
    assert contents(tmp_path) == {"file.txt": "after"}


def test_of_two_that_write_a_file_at_once_neither_fails_and_the_last_stays(tmp_path):
    def save(partial: Path) -> None:
        write(tmp_path / "file.txt", lambda other: other.write_text("other"))
        assert contents(tmp_path) == {"file.txt": "other"}
        partial.write_text("last")

    write(tmp_path / "file.txt", save)
    assert contents(tmp_path) == {"file.txt": "last"}


def test_a_file_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "file.txt").write_text("before")
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path / "file.txt", fail)
    assert contents(tmp_path) == {"file.txt": "before"}


def test_files_of_a_folder_appear_together(tmp_path):
    before = {"old.txt": "old", "kept.txt": "kept"}
    for _ in range(2):  # also over themselves
        with whole_files(tmp_path / "a" / "b") as partial:
            assert partial.parent == tmp_path / "a" / "b" and partial.name.startswith("partial-")
            for name, text in before.items():
                (partial.parent / name).write_text(text)
            (partial / "old.txt").write_text("new")
            (partial / "in" / "a" / "folder").mkdir(parents=True)
            (partial / "in" / "a" / "folder" / "file.txt").write_text("file")
            (partial / "in" / "a" / "folder" / "beside.txt").write_text("beside")
        folder = {"in/a/folder/file.txt": "file", "in/a/folder/beside.txt": "beside"}
        assert contents(tmp_path / "a" / "b") == folder | {"old.txt": "new", "kept.txt": "kept"}


def test_files_of_a_folder_that_fails_do_not_appear(tmp_path):
    (tmp_path / "old.txt").write_text("old")
    with pytest.raises(OSError, match="no space left"), whole_files(tmp_path) as partial:
        (partial / "old.txt").write_text("new")
        fail(partial / "file.txt")
    assert contents(tmp_path) == {"old.txt": "old"} and [path.name for path in tmp_path.iterdir()] == ["old.txt"]
