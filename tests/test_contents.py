"""What sources and files hold, told from names, sizes and times as long as these suffice."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from miniature import base
from PIL import Image

from study.cli import app
from study.files import UserError, read_json, sha256, write_json
from study.ledger import checks, contents, owner
from study.spec.study import load


def images(folder: Path, count: int = 3, seed: int = 0) -> Path:
    draw(folder, count, seed)
    return folder


def convert(source: Path, archive: Path) -> None:
    kind = "folder" if source.is_dir() else "zip"
    spec = f'{{"name": "mine", "source": "{kind}"}}'
    arguments = ["convert", "--spec", spec, "--source-path", str(source), "--out", str(archive)]
    app([*arguments, "--code", "c0de"], standalone_mode=False)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A source and the archive that was made from it."""
    source, archive = images(tmp_path / "images"), tmp_path / "results" / "mine.zip"
    convert(source, archive)
    return source, archive


def flip(path: Path) -> None:
    """Another content of the same size, at the same time."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


def unread(monkeypatch) -> None:
    """From here on nothing is read."""

    def refuse(path):
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr(contents, "sha256", refuse)


def test_source_is_the_same_before_and_after_its_conversion(tmp_path, monkeypatch):
    source, archive = images(tmp_path / "images"), tmp_path / "mine.zip"
    before = contents.source(str(source), archive)
    convert(source, archive)
    unread(monkeypatch)
    assert contents.source(str(source), archive) == before == contents.made_from(archive)


def test_a_moved_source_is_not_read_again(made, monkeypatch):
    source, archive = made
    former = contents.made_from(archive)
    moved = source.rename(source.with_name("elsewhere"))
    unread(monkeypatch)
    assert contents.source(str(moved), archive) == former


def test_a_copied_or_touched_source_is_read_once(made, monkeypatch, capsys):
    source, archive = made
    former = contents.made_from(archive)
    copy = shutil.copytree(source, source.with_name("copy"), copy_function=shutil.copyfile)
    assert contents.source(str(copy), archive) == former
    assert "reading it again" in capsys.readouterr().err
    unread(monkeypatch)
    assert contents.source(str(copy), archive) == former
    assert contents.source(str(source), archive) == former


def grown(source: Path) -> None:
    shutil.copy(source / "a/0.png", source / "a/9.png")


def shrunk(source: Path) -> None:
    (source / "b/2.png").unlink()


def renamed(source: Path) -> None:
    (source / "b").rename(source / "c")


def edited(source: Path) -> None:
    """Other pixels, in a file of the same size."""
    path = source / "a/1.png"
    size = path.stat().st_size
    with Image.open(path) as image:
        pixels = np.asarray(image)
    Image.fromarray(255 - pixels).save(path, compress_level=0)
    assert path.stat().st_size == size


def with_an_empty_class(source: Path) -> None:
    (source / "d").mkdir()


@pytest.mark.parametrize("change", [grown, shrunk, renamed, edited, with_an_empty_class])
def test_a_source_that_changed_is_another_until_it_is_as_before(made, change):
    source, archive = made
    former, kept = contents.made_from(archive), source.with_name("kept")
    shutil.copytree(source, kept)
    change(source)
    now = contents.source(str(source), archive)
    assert now != former
    assert contents.source(str(source), archive) == now
    assert contents.source(str(kept), archive) == former


def test_after_a_change_of_content_alone_the_conversion_notes_the_new_identity(made):
    source, archive = made
    edited(source)
    now = contents.source(str(source), archive)
    convert(source, archive)
    assert contents.made_from(archive) == now == contents.source(str(source), archive)


def test_what_file_managers_leave_behind_is_no_content(made):
    source, archive = made
    (source / "@eaDir").mkdir()
    (source / "@eaDir" / "0.png").write_bytes(b"x")
    (source / ".DS_Store").write_bytes(b"x")
    assert contents.source(str(source), archive) == contents.made_from(archive)


def test_a_source_that_is_gone_is_as_it_was(made):
    source, archive = made
    former = contents.made_from(archive)
    shutil.rmtree(source)
    assert contents.gone(str(source))
    assert contents.source(str(source), archive) == former
    assert contents.code(str(source), archive, "new") == "c0de"
    assert contents.code(str(archive), archive, "new") == "new"


def test_a_source_of_many_files_is_told_from_its_folders(made, monkeypatch):
    source, archive = made
    monkeypatch.setattr(contents, "MANY", 5)
    convert(source, archive)
    unread(monkeypatch)
    monkeypatch.setattr(contents, "_members", None)  # nor are its files listed
    assert contents.source(str(source), archive) == contents.made_from(archive)
    monkeypatch.undo()
    grown(source)
    assert contents.source(str(source), archive) != contents.made_from(archive)


def test_a_zip_is_told_by_its_content_and_not_by_its_name(tmp_path):
    packed = Path(shutil.make_archive(str(tmp_path / "a"), "zip", images(tmp_path / "images")))
    archive = tmp_path / "mine.zip"
    convert(packed, archive)
    copy = Path(shutil.copyfile(packed, tmp_path / "b.zip"))
    assert contents.source(str(copy), archive) == contents.made_from(archive)
    flip(copy)
    assert contents.source(str(copy), archive) != contents.made_from(archive)


def test_a_link_that_leads_up_and_a_pipe_hold_nothing_up(made):
    source, _ = made
    (source / "a" / "up").symlink_to(source)
    os.mkfifo(source / "a" / "pipe")
    assert contents.survey(source).files == 6
    contents.digest(source)


def test_the_description_is_of_content_alone(made, tmp_path):
    source, archive = made
    again = tmp_path / "again" / "mine.zip"
    convert(source.rename(source.with_name("elsewhere")), again)
    assert contents.described(archive).read_bytes() == contents.described(again).read_bytes()
    assert read_json(contents.described(again))["images"] == 6


def test_an_archive_that_was_copied_over_is_one_line(made, tmp_path):
    _, archive = made
    contents.check_archive(archive)
    os.utime(archive)
    contents.check_archive(archive)  # touched
    other = tmp_path / "other" / "mine.zip"
    convert(images(tmp_path / "others", seed=1), other)
    kept = archive.read_bytes()
    shutil.copy2(other, archive)
    with pytest.raises(UserError, match=r"mine\.zip: holds other images .* delete it"):
        contents.check_archive(archive)
    archive.write_bytes(b"no zip")
    with pytest.raises(UserError, match="holds other images"):
        contents.check_archive(archive)
    archive.write_bytes(kept)
    contents.check_archive(archive)
    archive.unlink()
    contents.check_archive(archive)


def test_hash_of_a_file_is_taken_once_and_kept(tmp_path, monkeypatch):
    weights, kept = tmp_path / "weights", tmp_path / "kept.json"
    weights.write_bytes(b"one")
    first = contents.Hashes(kept)("decoder", weights)
    assert first == sha256(weights)[:16]
    moved = weights.rename(tmp_path / "moved")
    with monkeypatch.context() as patched:
        unread(patched)
        assert contents.Hashes(kept)("decoder", moved) == first
    os.utime(moved)
    assert contents.Hashes(kept)("decoder", moved) == first
    times = moved.stat()
    moved.write_bytes(b"two")
    os.utime(moved, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    second = contents.Hashes(kept)("decoder", moved)
    assert second == sha256(moved)[:16] != first
    moved.unlink()
    assert contents.Hashes(kept)("decoder", moved) == second
    assert contents.Hashes(kept)("another role", moved) == ""


def test_a_large_file_is_settled_while_it_holds_what_its_record_says(tmp_path):
    samples, record = tmp_path / "samples.npz", tmp_path / "generate.json"
    samples.write_bytes(b"samples")
    write_json(record, {"sha": sha256(samples)})
    hashes = contents.Hashes(tmp_path / "kept.json")

    def later(path):
        os.utime(path, ns=(0, record.stat().st_mtime_ns + 10**9))

    assert contents.settled(samples, record, "sha", hashes)
    later(samples)
    assert contents.settled(samples, record, "sha", hashes)
    samples.write_bytes(b"others")
    later(samples)
    assert not contents.settled(samples, record, "sha", hashes)
    assert not contents.settled(samples, record, "unknown", hashes)
    samples.unlink()
    assert contents.settled(samples, record, "sha", hashes)


# --- who holds something -------------------------------------------------------------------------


def test_a_process_lives_until_it_ends():
    code = (
        "import json; from study.ledger import owner; print(json.dumps(owner.me()), flush=True)"
        "; input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    record = json.loads(process.stdout.readline())
    assert owner.lives(record) is True
    assert owner.lives(owner.me()) is True
    assert owner.lives({**record, "started": record["started"] + "1"}) is False  # number used again
    process.kill()
    end = time.monotonic() + 60
    while owner.lives(record) and time.monotonic() < end:  # nobody has waited for it yet
        time.sleep(0.01)
    assert owner.lives(record) is False
    process.wait()
    assert owner.lives(record) is False
    process.stdin.close()
    process.stdout.close()


def test_of_another_machine_nothing_is_known():
    assert owner.lives({**owner.me(), "host": "elsewhere"}) is None
    assert owner.lives({**owner.me(), "space": "pid:[1]"}) is None


def test_nobody_survives_the_start_of_the_machine():
    assert owner.lives({**owner.me(), "boot": "former", "since": 1.0}) is False


OLDER = {
    "study": "older",
    "dataset": {"name": "digits", "source": "digits"},
    "evaluation": {"extractor": "digits"},
}


@pytest.mark.parametrize(
    "content",
    [
        {"config": OLDER},
        {"config": OLDER | {"evaluation": {"extractor": "digits", "reference": None}}},
        {"config": {"study": "older", "dataset": "digits"}},
        {"config": {"study": "older"}},
        {"runs": []},
        [],
    ],
)
def test_a_study_that_an_older_version_described_keeps_none_from_running(tmp_path, content):
    (tmp_path / "older").mkdir()
    (tmp_path / "older/study.json").write_text(json.dumps(content))
    checks.check_shared(load(base()), tmp_path)


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("dataset", {"resolution": 4}, "dataset.name: 'digits' is a data set of"),
        ("evaluation", {"seed": 3}, "has trained the classifier of 'digits' with seed 3"),
    ],
)
def test_what_an_older_version_means_by_a_name_is_known(tmp_path, section, change, words):
    (tmp_path / "older").mkdir()
    content = {"config": OLDER | {section: OLDER[section] | change}}
    (tmp_path / "older/study.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        checks.check_shared(load(base()), tmp_path)
