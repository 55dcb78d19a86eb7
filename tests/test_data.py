"""The data room: sources, conversion, archives, the order of images."""

import io
import json
import multiprocessing
import pickle
import struct
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from study.data import Archive, order, reference_indices
from study.data.archive import encode_png
from study.data.convert import convert, square
from study.data.sources.tree import open_tree
from study.files import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pixels(seed: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(seed: int = 0, height: int = 8, width: int = 8, mode: str = "RGB", **save) -> bytes:
    image = Image.fromarray(pixels(seed, height, width)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, save.pop("format", "PNG"), **save)
    return buffer.getvalue()


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def make_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


CLASSES = {"dog/2.png": png(1), "cat/b.png": png(2), "cat/a.png": png(3), "ant/1.png": png(4)}


def run(tmp_path: Path, source: str, path: Path | None = None, **spec) -> tuple[dict, Archive]:
    out = tmp_path / "out.zip"
    return convert({"source": source, **spec}, out, path), Archive(out)


def failure(tmp_path: Path, source: str, path: Path | None = None, **spec) -> str:
    out = tmp_path / "failed.zip"
    with pytest.raises(UserError) as caught:
        convert({"source": source, **spec}, out, path)
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Digits, format and determinism


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "digits.zip"
    return convert({"name": "digits", "source": "digits"}, path), path


def test_digits_are_the_published_images_scaled_exactly(digits):
    from sklearn.datasets import load_digits

    summary, path = digits
    archive = Archive(path)
    bunch = load_digits()
    assert summary["images"] == len(archive) == 1797
    assert (archive.resolution, archive.channels, archive.num_classes) == (8, 1, 10)
    assert archive.classes == list("0123456789")
    assert np.array_equal(archive.labels, bunch.target)
    expected = [round(level * 255 / 16) for level in range(17)]
    levels = bunch.images.astype(int)
    assert np.array_equal(archive.images()[..., 0], np.take(expected, levels))
    assert expected[0] == 0
    assert expected[16] == 255


def test_the_same_input_gives_the_same_bytes(digits, tmp_path):
    summary, path = digits
    for workers in (1, 3):
        out = tmp_path / f"{workers}.zip"
        again = convert({"name": "digits", "source": "digits"}, out, workers=workers)
        assert out.read_bytes() == path.read_bytes()
        assert again["sha256"] == summary["sha256"]


def test_other_tools_can_read_the_archive(digits):
    """As EDM's loader does: sorted image names, Pillow, labels by name from the JSON."""
    _, path = digits
    archive = Archive(path)
    with zipfile.ZipFile(path) as file:
        infos = file.infolist()
        assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
        assert infos[-1].filename == "dataset.json"
        assert infos[0].filename == "00000/img00000000.png"
        assert infos[1000].filename == "00001/img00001000.png"
        assert file.testzip() is None
        labels = dict(json.loads(file.read("dataset.json"))["labels"])
        names = sorted(name for name in file.namelist() if name.endswith(".png"))
        for index in (0, 1, 1796):
            image = Image.open(io.BytesIO(file.read(names[index])))
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), archive.images([index])[0, :, :, 0])
            assert labels[names[index]] == archive.labels[index]


def test_the_description_names_content_and_settings_but_no_machine_path(tmp_path):
    folder = fill(tmp_path / "secret-place", CLASSES)
    summary, archive = run(tmp_path, "folder", folder, name="pets", resolution=4, resize="box")
    meta = archive.meta
    assert meta["name"] == archive.name == "pets"
    assert meta["classes"] == ["ant", "cat", "dog"]
    assert (meta["resolution"], meta["channels"], meta["images"]) == (4, 3, 4)
    assert meta["conversion"]["resize"] == "box"
    assert meta["sha256"] == archive.sha256 == summary["sha256"]
    with zipfile.ZipFile(tmp_path / "out.zip") as file:
        assert "secret-place" not in file.read("dataset.json").decode()


@pytest.mark.parametrize("side", [1, 2, 8, 33, 200])
@pytest.mark.parametrize("channels", [1, 3])
def test_png_encoding_round_trips_through_pillow(side, channels):
    image = pixels(side, side, side, channels)
    decoded = Image.open(io.BytesIO(encode_png(image)))
    decoded.load()
    assert np.array_equal(np.asarray(decoded).reshape(image.shape), image)


def test_max_images_spreads_over_the_classes(tmp_path):
    files = {f"{name}/{k}.png": png(k) for name in "abc" for k in range(6)}
    _, archive = run(tmp_path, "folder", fill(tmp_path / "in", files), max_images=6)
    assert archive.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_colour_modes(tmp_path):
    folder = fill(tmp_path / "in", {"a.png": png(1, mode="L"), "b.png": png(2, mode="L")})
    _, rgb = run(tmp_path, "folder", folder)
    assert rgb.channels == 3
    assert (rgb.images()[..., 0] == rgb.images()[..., 2]).all()
    _, keep = run(tmp_path, "folder", folder, color="keep")
    assert keep.channels == 1
    assert np.array_equal(keep.images(), rgb.images()[..., :1])
    fill(folder, {"c.png": png(3)})
    assert "8 x 8 x 3, but a.png is 8 x 8 x 1" in failure(tmp_path, "folder", folder, color="keep")
    _, grey = run(tmp_path, "folder", folder, color="grey")
    luma = np.asarray(Image.fromarray(pixels(3)).convert("L"))
    assert np.array_equal(grey.images([2])[0, :, :, 0], luma)


def test_channels_are_checked_where_given(tmp_path):
    assert "1 channels, not 3" in failure(tmp_path, "digits", channels=3)


def test_harmless_modes_are_accepted(tmp_path):
    opaque = Image.fromarray(pixels(1)).convert("RGBA")
    buffer = io.BytesIO()
    opaque.save(buffer, "PNG")
    palette = Image.fromarray(pixels(2)).quantize(16)
    second = io.BytesIO()
    palette.save(second, "PNG")
    bilevel = png(3, mode="1")
    files = {"a.png": buffer.getvalue(), "b.png": second.getvalue(), "c.png": bilevel}
    _, archive = run(tmp_path, "folder", fill(tmp_path / "in", files))
    assert np.array_equal(archive.images([0])[0], pixels(1))
    assert np.array_equal(archive.images([1])[0], np.asarray(palette.convert("RGB")))
    assert set(np.unique(archive.images([2]))) <= {0, 255}


# Trees


def test_folder_zip_and_tars_of_the_same_images_agree(tmp_path):
    folder = fill(tmp_path / "in", CLASSES)
    _, expected = run(tmp_path, "folder", folder)
    assert expected.classes == ["ant", "cat", "dog"]
    assert expected.labels.tolist() == [0, 1, 1, 2]
    for row, seed in enumerate([4, 3, 2, 1]):
        assert np.array_equal(expected.images([row])[0], pixels(seed))
    others = {
        "zip": make_zip(tmp_path / "a.zip", CLASSES, zipfile.ZIP_DEFLATED),
        "tar": make_tar(tmp_path / "a.tar", CLASSES),
    }
    for kind, path in others.items():
        assert run(tmp_path, kind, path)[0]["sha256"] == expected.sha256
    for suffix in ("gz", "bz2", "xz"):
        path = make_tar(tmp_path / f"a.tar.{suffix}", CLASSES, f"w:{suffix}")
        assert run(tmp_path, "tar", path)[0]["sha256"] == expected.sha256
    wrapped = {f"pets-v2/{name}": content for name, content in CLASSES.items()}
    wrapped |= {"pets-v2/readme.txt": b"hello", "__MACOSX/pets-v2/._a.png": b"", ".hidden": b""}
    summary, archive = run(tmp_path, "zip", make_zip(tmp_path / "w.zip", wrapped))
    assert archive.sha256 == expected.sha256
    assert summary["ignored"] == 1


def test_a_flat_folder_has_no_labels(tmp_path):
    folder = fill(tmp_path / "in", {"a.png": png(1), "b.png": png(2)})
    summary, archive = run(tmp_path, "folder", folder)
    assert archive.labels is None
    assert archive.classes is None
    assert (archive.num_classes, summary["classes"]) == (0, 0)
    assert archive.batch([0])[1] is None


def test_labels_false_leaves_them_out(tmp_path):
    files = {**CLASSES, "loose.png": png(9)}
    _, archive = run(tmp_path, "folder", fill(tmp_path / "in", files), labels=False)
    assert archive.labels is None
    assert len(archive) == 5


def test_splits_of_a_folder(tmp_path):
    files = {f"train/{name}": content for name, content in CLASSES.items()}
    files |= {"val/cat/z.png": png(8), "val/ant/z.png": png(9)}
    folder = fill(tmp_path / "in", files)
    _, train = run(tmp_path, "folder", folder)
    assert train.classes == ["ant", "cat", "dog"]
    for split in ("val", "test"):  # without a test part, val is the held-out one
        _, archive = run(tmp_path, "folder", folder, split=split)
        assert archive.classes == ["ant", "cat"]
        assert archive.meta["split"] == "val"
    only_val = fill(tmp_path / "only", {"val/cat/1.png": png(), "val/dog/1.png": png()})
    message = failure(tmp_path, "folder", only_val)
    assert "no folder of the split 'train' (splits there: val)" in message
    two = fill(tmp_path / "two", {"a/train/1.png": png(), "b/train/1.png": png()})
    assert "several folders hold the split 'train'" in failure(tmp_path, "folder", two)


def test_a_class_called_train_is_a_class(tmp_path):
    folder = fill(tmp_path / "in", {"bus/1.png": png(1), "train/1.png": png(2)})
    assert run(tmp_path, "folder", folder, split="train")[1].classes == ["bus", "train"]


def test_links_to_class_folders_are_followed_and_loops_end(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", {"1.png": png(1)})
    folder = fill(tmp_path / "in", {"cat/1.png": png(2)})
    (folder / "dog").symlink_to(elsewhere)
    (folder / "cat" / "again").symlink_to(folder)
    assert open_tree(folder).members == ["cat/1.png", "dog/1.png"]
    _, archive = run(tmp_path, "folder", folder)
    assert archive.classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.png": png(), "b.png": b"not a picture"}, "b.png (broken image: not an image of"),
        ({"a.png": png(), "b.png": png()[:90]}, "b.png (broken image: "),
        ({"a.png": png(), "b.png": png(1, 4, 4)}, "b.png (mixed size: 4 x 4 x 3, but a.png is 8 x"),
        ({"a.png": png(0, 8, 9)}, "a.png (not square: 9 x 8; crop: center would cut a square)"),
        ({"a.jpg": png(mode="CMYK", format="JPEG")}, "a.jpg (unsupported mode: CMYK"),
        ({"a.png": png(mode="I;16")}, "a.png (unsupported mode: 16 bits per channel"),
        (
            {"a.png": png(mode="P", transparency=0)},
            "a.png (unsupported mode: P with transparency)",
        ),
        (
            {"a.gif": png(format="GIF", save_all=True, append_images=[Image.fromarray(pixels(7))])},
            "a.gif (unsupported mode: animation of 2 frames)",
        ),
    ],
)
def test_unusable_images_are_named(tmp_path, files, expected):
    folder = fill(tmp_path / "in", files)
    message = failure(tmp_path, "folder", folder, name="pets")
    assert message.startswith("dataset pets: 1 item cannot be used (1 ")
    assert expected in message
    assert "on_error: skip" in message


def test_transparent_pixels_are_refused(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(buffer, "PNG")
    folder = fill(tmp_path / "in", {"a.png": buffer.getvalue()})
    assert "RGBA with transparent pixels" in failure(tmp_path, "folder", folder)


def test_sixteen_bit_colour_is_refused(tmp_path):
    """Pillow would read it as 8-bit without a word."""
    header = bytearray(png())
    header[24] = 16
    folder = fill(tmp_path / "in", {"a.png": bytes(header)})
    assert "16 bits per channel" in failure(tmp_path, "folder", folder)


def test_at_most_ten_problems_are_listed_with_counts(tmp_path):
    files = {f"{k:02d}.png": b"?" for k in range(3)} | {"03.png": png(), "04.png": png(1, 4, 4)}
    message = failure(tmp_path, "folder", fill(tmp_path / "few", files))
    assert "4 items cannot be used (3 broken image, 1 mixed size)" in message
    files = {f"{k:02d}.png": b"?" for k in range(30)}
    message = failure(tmp_path, "folder", fill(tmp_path / "many", files))
    assert "at least 11 items cannot be used (11 broken image)" in message
    assert "09.png" in message
    assert "10.png" not in message


def test_skipping_lists_what_was_left_out(tmp_path):
    files = {**CLASSES, "cat/bad.png": b"?", "dog/odd.png": png(5, 4, 4)}
    folder = fill(tmp_path / "in", files)
    out = tmp_path / "out.zip"
    assert "cannot be used" in failure(tmp_path, "folder", folder, on_error="fail")
    summary = convert({"source": "folder"}, out, folder, on_error="skip")
    assert (summary["images"], summary["skipped"]) == (4, 2)
    listed = json.loads(Path(summary["skipped_file"]).read_text())
    assert Path(summary["skipped_file"]) == tmp_path / "out.zip.skipped.json"
    assert listed["counts"] == {"broken image": 1, "mixed size": 1}
    assert [item["name"] for item in listed["items"]] == ["cat/bad.png", "dog/odd.png"]
    clean = fill(tmp_path / "clean", CLASSES)
    again = convert({"source": "folder"}, out, clean)
    assert again["sha256"] == summary["sha256"]
    assert again["skipped_file"] is None
    assert not (tmp_path / "out.zip.skipped.json").exists()


def test_skipping_does_not_hide_that_nothing_fits(tmp_path):
    folder = fill(tmp_path / "in", {f"{k}.png": png(k, 8 + k, 8 + k) for k in range(4)})
    message = failure(tmp_path, "folder", folder, on_error="skip")
    assert "3 images differ in size or channels from 0.png, and only 1 agree" in message
    folder = fill(tmp_path / "bad", {"1.png": b"?"})
    assert "none of 1 items can be used (1 broken" in failure(
        tmp_path, "folder", folder, on_error="skip"
    )


def test_a_failure_keeps_the_former_archive(tmp_path):
    out = tmp_path / "out.zip"
    convert({"source": "folder"}, out, fill(tmp_path / "in", CLASSES))
    before = out.read_bytes()
    with pytest.raises(UserError):
        convert({"source": "folder"}, out, fill(tmp_path / "bad", {"a.png": b"?"}))
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "in", "out.zip"]


def test_empty_class_folders(tmp_path):
    folder = fill(tmp_path / "in", {"cat/1.png": png(1), "dog/1.png": png(2)})
    (folder / "cow").mkdir()
    assert "cow (empty folder: no images in it" in failure(tmp_path, "folder", folder)
    summary, archive = run(tmp_path, "folder", folder, on_error="skip")
    assert archive.classes == ["cat", "dog"]
    assert summary["skipped"] == 1
    one = fill(tmp_path / "one", {"cat/1.png": png(1)})
    (one / "dog").mkdir()
    assert "dog (empty folder" in failure(tmp_path, "folder", one)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_and_unsafe_members(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("ok.png", "a.png", "../out.png", "a.png", "/etc/b.png", "C:\\c.png"):
            file.writestr(name, png())
    message = failure(tmp_path, "zip", path)
    assert "1 duplicate name, 3 unsafe path" in message
    assert "../out.png (unsafe path: absolute, or leads outside)" in message
    summary, archive = run(tmp_path, "zip", path, on_error="skip")
    assert (summary["skipped"], len(archive)) == (4, 1)
    tar = make_tar(tmp_path / "a.tar", {"ok.png": png(), "x/../../b.png": png(), "/c.png": png()})
    assert "2 unsafe path" in failure(tmp_path, "tar", tar)


def test_links_in_a_tar_are_refused(tmp_path):
    path = make_tar(tmp_path / "a.tar", {"a.png": png()})
    with tarfile.open(path, "a") as file:
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(info)
    assert "b.png (not a plain file: " in failure(tmp_path, "tar", path)


def test_damaged_members_are_named(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a.png": png(1), "b.png": png(2)})
    content = bytearray(path.read_bytes())
    content[content.rindex(b"IDAT") + 10] ^= 0xFF
    path.write_bytes(content)
    assert "b.png (unreadable: Bad CRC-32" in failure(tmp_path, "zip", path)


def test_encrypted_members_are_named(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a.png": png(1), "b.png": png(2)})
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x03\x04") + 6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    message = failure(tmp_path, "zip", path)
    assert "b.png (unreadable: File 'b.png' is encrypted" in message
    with pytest.raises(UserError, match=r"cannot read b\.png: encrypted"):
        Archive(path).images()


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_unreadable_archives(tmp_path, suffix):
    kind = suffix.split(".")[1]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\x1f\x8b not really")
    assert f"{path}: not a readable {kind} file" in failure(tmp_path, kind, path)
    make = make_zip if kind == "zip" else make_tar
    make(path, {"a.png": bytes(3000)}, *(["w:gz"] if suffix == ".tar.gz" else []))
    path.write_bytes(path.read_bytes()[:-60] if suffix != ".tar" else path.read_bytes()[:1500])
    assert f"{path}: not a readable {kind} file" in failure(tmp_path, kind, path)


def test_paths_and_kinds(tmp_path):
    assert "needs a path" in failure(tmp_path, "folder")
    assert "no such file or folder" in failure(tmp_path, "folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no images in it (looked for" in failure(tmp_path, "folder", tmp_path / "empty")
    path = make_zip(tmp_path / "a.zip", CLASSES)
    assert "is a zip, not a folder: set source: zip" in failure(tmp_path, "folder", path)
    assert "is a folder, not a tar" in failure(tmp_path, "tar", tmp_path / "empty")
    text = fill(tmp_path, {"a.txt": b"hello"}) / "a.txt"
    assert "neither a folder nor a zip or tar" in failure(tmp_path, "ffhq", text)
    loose = fill(tmp_path / "loose", {**CLASSES, "x.png": png()})
    assert "1 images lie beside the class folders, the first is x.png" in failure(
        tmp_path, "folder", loose
    )


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"sorce": "digits"}, "unknown key 'sorce'"),
        ({"source": "mnist"}, "source is 'mnist', but must be one of digits, folder"),
        ({"source": "digits", "crop": "top"}, "crop is 'top', but must be one of none, center"),
        ({"source": "digits", "resolution": 0}, "resolution is 0, but must be a whole number"),
        ({"source": "digits", "crop": "center_dhariwal"}, "needs a resolution"),
        ({"source": "digits", "split": "test"}, "digits has no split 'test'"),
    ],
)
def test_wrong_settings(tmp_path, spec, expected):
    with pytest.raises(UserError, match="dataset") as caught:
        convert(spec, tmp_path / "a.zip")
    assert expected in str(caught.value)


# Crops


def test_center_crop_then_resize():
    image = Image.fromarray(pixels(0, 30, 17))
    expected = image.crop((0, 6, 17, 23)).resize((8, 8), Image.Resampling.BOX)
    assert np.array_equal(square(image, "center", 8, "box"), expected)
    assert square(image, "center", None, "box").size == (17, 17)


def test_adm_crop_halves_with_a_box_before_the_bicubic_step():
    image = Image.fromarray(pixels(0, 70, 41))
    halved = image.resize((20, 35), Image.Resampling.BOX)
    expected = halved.resize((16, 28), Image.Resampling.BICUBIC).crop((0, 6, 16, 22))
    assert np.array_equal(square(image, "center_dhariwal", 16, "lanczos"), expected)


def test_celeba_crop_is_the_published_window(tmp_path):
    image = pixels(0, 218, 178)
    assert np.array_equal(square(Image.fromarray(image), "celeba", None, ""), image[57:185, 25:153])
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    folder = fill(tmp_path / "in", {"000001.png": buffer.getvalue(), "000002.png": png()})
    message = failure(tmp_path, "celeba", folder, crop="celeba", resolution=64)
    assert "000002.png (wrong size: 8 x 8; aligned CelebA images are 178 x 218)" in message
    _, archive = run(tmp_path, "celeba", folder, crop="celeba", resolution=64, on_error="skip")
    small = Image.fromarray(image[57:185, 25:153]).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(archive.images()[0], small)


# Published layouts


def test_imagenet_layout(tmp_path):
    cmyk = png(1, mode="CMYK", format="JPEG")
    files = {"train/n02/b.JPEG": cmyk, "train/n01/a.JPEG": png(2, format="JPEG")}
    bad = fill(tmp_path / "bad", files)
    assert "folders like n01440764, but found the folder 'n01'" in failure(
        tmp_path, "imagenet", bad
    )
    files = {name.replace("n0", "n0000000"): content for name, content in files.items()}
    files["val/x.JPEG"] = png(3, format="JPEG")
    folder = fill(tmp_path / "in", files)
    _, archive = run(tmp_path, "imagenet", folder)
    assert archive.classes == ["n00000001", "n00000002"]
    expected = Image.open(io.BytesIO(cmyk)).convert("RGB")
    assert np.array_equal(archive.images([1])[0], expected)
    message = failure(tmp_path, "imagenet", folder, split="val")
    assert "found images in one folder" in message
    assert len(run(tmp_path, "imagenet", folder, split="val", labels=False)[1]) == 1


def test_afhq_layout(tmp_path):
    files = {f"afhq/{part}/{name}/1.png": png() for part in ("train", "val") for name in "ab"}
    assert "AFHQ's classes are cat, dog and wild; found 'a'" in failure(
        tmp_path, "afhq", fill(tmp_path / "bad", files)
    )
    files = {
        f"afhq/{part}/{name}/1.png": png(seed)
        for part in ("train", "val")
        for seed, name in enumerate(("wild", "cat", "dog"))
    }
    _, archive = run(tmp_path, "afhq", make_zip(tmp_path / "a.zip", files), split="test")
    assert archive.classes == ["cat", "dog", "wild"]
    assert archive.meta["split"] == "val"


def test_numbered_layouts_and_their_official_splits(tmp_path):
    celeba = {f"img_align_celeba/{n:06d}.jpg": png(n % 50) for n in (1, 162770, 162771, 182638)}
    celeba["in_the_wild/000001.jpg"] = png(9, 5, 5)
    folder = fill(tmp_path / "celeba", celeba)
    for split, count in (("train", 2), ("val", 1), ("test", 1), ("all", 4)):
        assert len(run(tmp_path, "celeba", folder, split=split)[1]) == count
    assert len(run(tmp_path, "celeba", folder)[1]) == 2
    ffhq = {f"{n // 1000:05d}/{n:05d}.png": png(n % 7) for n in (0, 59999, 60000)}
    path = make_zip(tmp_path / "ffhq.zip", ffhq)
    for split, count in ((None, 3), ("train", 2), ("test", 1)):
        _, archive = run(tmp_path, "ffhq", path, split=split)
        assert len(archive) == count
        assert archive.labels is None
    assert "LICENSE.png (unknown name: " in failure(
        tmp_path, "ffhq", make_zip(tmp_path / "x.zip", {**ffhq, "LICENSE.png": png()})
    )
    only = make_zip(tmp_path / "y.zip", {"00000.png": png()})
    assert "no images of the split 'test'" in failure(tmp_path, "ffhq", only, split="test")


def test_lsun_folder_and_database(tmp_path):
    folder = fill(tmp_path / "church", {"0/a.webp": png(1, format="WEBP", lossless=True)})
    _, archive = run(tmp_path, "lsun", folder)
    assert np.array_equal(archive.images()[0], pixels(1))
    database = fill(tmp_path / "church_lmdb", {"data.mdb": b""})
    assert "not a readable LMDB (cut short" in failure(tmp_path, "lsun", database)
    zipped = make_zip(tmp_path / "l.zip", {"church_lmdb/data.mdb": b""})
    assert "unpack it" in failure(tmp_path, "lsun", zipped)


def test_lsun_database_is_read(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    path = tmp_path / "church_lmdb"
    with lmdb.open(str(path)) as database, database.begin(write=True) as transaction:
        for seed in (2, 0, 1):
            key = f"{seed:040x}".encode()
            transaction.put(key, png(seed, format="WEBP", lossless=True))
    _, archive = run(tmp_path, "lsun", path)
    assert np.array_equal(archive.images(), np.stack([pixels(seed) for seed in range(3)]))


# CIFAR-10


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as in the published files."""

    def __init__(self, file):
        super().__init__(file, protocol=2)

    def save_string(self, value):
        code, length = (b"U", 1) if len(value) < 256 else (b"T", 4)
        self.write(code + len(value).to_bytes(length, "little") + value)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_string}  # noqa: RUF012


def cifar_batch(seed: int, rows: int = 4) -> bytes:
    generator = np.random.default_rng(seed)
    content = {
        b"batch_label": b"a batch",
        b"labels": [int(n) for n in generator.integers(0, 10, rows)],
        b"data": generator.integers(0, 256, (rows, 3072), dtype=np.uint8),
        b"filenames": [b"x_%d.png" % row for row in range(rows)],
    }
    buffer = io.BytesIO()
    Python2Pickler(buffer).dump(content)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_files() -> dict[str, bytes]:
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    return {f"cifar-10-batches-py/{name}": cifar_batch(k) for k, name in enumerate(names)}


def test_cifar10_archive_packed_and_unpacked(tmp_path):
    files = cifar_files()
    packed = make_tar(tmp_path / "cifar-10-python.tar.gz", files, "w:gz")
    summary, archive = run(tmp_path, "cifar10", packed)
    assert summary["images"] == 20
    assert archive.classes[:3] == ["airplane", "automobile", "bird"]
    assert archive.num_classes == 10
    raw = np.random.default_rng(1)
    labels, data = raw.integers(0, 10, 4), raw.integers(0, 256, (4, 3072), dtype=np.uint8)
    assert archive.labels[4:8].tolist() == labels.tolist()
    assert np.array_equal(archive.images([5])[0].transpose(2, 0, 1).ravel(), data[1])
    folder = fill(tmp_path / "unpacked", files)
    for path in (folder, folder / "cifar-10-batches-py", tmp_path):
        assert run(tmp_path, "cifar10", path)[0]["sha256"] == summary["sha256"]
    assert len(run(tmp_path, "cifar10", folder, split="test")[1]) == 4
    assert len(run(tmp_path, "cifar10", folder, split="all")[1]) == 24


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_cifar10_pickles_cannot_run_code(tmp_path, capsys):
    files = cifar_files()
    files["cifar-10-batches-py/data_batch_3"] = pickle.dumps({"data": Evil()}, protocol=2)
    message = failure(tmp_path, "cifar10", fill(tmp_path / "in", files))
    assert "data_batch_3 was refused: it refers to __builtin__.print" in message
    assert "must not run" not in capsys.readouterr().out


def test_cifar10_files_that_are_something_else(tmp_path):
    files = cifar_files()
    files["cifar-10-batches-py/data_batch_2"] = b"junk"
    folder = fill(tmp_path / "in", files)
    assert "data_batch_2 was refused: it is not a readable pickle" in failure(
        tmp_path, "cifar10", folder
    )
    fill(folder, {"cifar-10-batches-py/data_batch_2": pickle.dumps([1, 2])})
    assert "data_batch_2 is not a CIFAR-10 batch" in failure(tmp_path, "cifar10", folder)
    (folder / "cifar-10-batches-py/data_batch_2").unlink()
    assert "data_batch_2 is missing" in failure(tmp_path, "cifar10", folder)
    assert "no split 'val'" in failure(tmp_path, "cifar10", folder, split="val")


# Latents


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def latent(seed: int, channels: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(channels, 4, 4)).astype(np.float32)


def test_latents_in_class_folders(tmp_path):
    files = {"n2/0.npy": npy(latent(1)), "n1/0.npy": npy(latent(0)[None].astype(np.float64))}
    summary, archive = run(tmp_path, "latents", fill(tmp_path / "in", files))
    assert summary["kind"] == "latents"
    assert (archive.latents, archive.moments, archive.channels) == (True, False, 4)
    assert archive.classes == ["n1", "n2"]
    assert archive.images().dtype == np.float32
    assert np.array_equal(archive.images(), np.stack([latent(0), latent(1)]))
    assert np.array_equal(archive.resident(), archive.images())
    x, labels = archive.batch([1, 0])
    assert np.array_equal(x, np.stack([latent(1), latent(0)]))
    assert labels.tolist() == [1, 0]
    with zipfile.ZipFile(tmp_path / "out.zip") as file:
        stored = np.load(io.BytesIO(file.read("00000/img00000001.npy")), allow_pickle=False)
    assert np.array_equal(stored, latent(1))


def test_latents_in_npz_with_labels(tmp_path):
    buffer = io.BytesIO()
    batch = np.stack([latent(seed) for seed in range(3)])
    np.savez(buffer, latents=batch, labels=np.array([2, 0, 1]))
    single = io.BytesIO()
    np.savez(single, latents=latent(3), labels=np.array(1))
    files = {"a.npz": buffer.getvalue(), "b.npz": single.getvalue()}
    _, archive = run(tmp_path, "latents", make_zip(tmp_path / "l.zip", files))
    assert archive.labels.tolist() == [2, 0, 1, 1]
    assert archive.classes == ["0", "1", "2"]
    assert np.array_equal(archive.images(), np.stack([latent(seed) for seed in range(4)]))


def test_latents_of_dit_and_uvit_extractors(tmp_path):
    dit = {f"imagenet256_features/{k}.npy": npy(latent(k)[None]) for k in range(3)}
    dit |= {f"imagenet256_labels/{k}.npy": npy(np.array([5 - k])) for k in range(3)}
    _, archive = run(tmp_path, "latents", fill(tmp_path / "dit", dit))
    assert archive.labels.tolist() == [5, 4, 3]
    pair = np.empty(2, object)
    pair[:] = [latent(0, 8), np.int64(7)]
    uvit = {"0.npy": npy(pair), "1.npy": npy(pair)}
    folder = fill(tmp_path / "uvit", uvit)
    _, archive = run(tmp_path, "latents", folder, moments="mean_logvar", scale=0.5)
    assert archive.labels.tolist() == [7, 7]
    assert (archive.moments, archive.channels) == (True, 4)
    mean, logvar = np.split(latent(0, 8), 2)
    expected = np.concatenate([0.5 * mean, 0.5 * np.exp(0.5 * logvar)])
    np.testing.assert_allclose(archive.images([0])[0], expected, rtol=1e-6)
    evil = np.empty(2, object)
    evil[:] = [latent(0), Evil()]
    fill(folder, {"1.npy": npy(evil)})
    message = failure(tmp_path, "latents", folder)
    assert "1.npy (broken file: it refers to builtins.print" in message


def test_moments_are_drawn_with_given_noise(tmp_path):
    files = {f"00000/img-mean-std-{k:08d}.npy": npy(np.abs(latent(k, 8))) for k in range(2)}
    path = make_zip(tmp_path / "edm2.zip", files)
    for archive in (Archive(path), run(tmp_path, "latents", path)[1]):
        assert archive.moments
        mean, std = np.split(archive.images([1, 0]), 2, axis=1)
        assert np.array_equal(archive.batch([1, 0])[0], mean)
        draw = np.random.default_rng(0).normal(size=mean.shape).astype(np.float32)
        np.testing.assert_allclose(archive.batch([1, 0], draw)[0], mean + std * draw, rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (npy(np.zeros((4, 4))), "not a latent: float64 [4, 4], not float [C, H, W]"),
        (npy(np.zeros((4, 4, 4), int)), "not a latent: int64"),
        (npy(np.full((4, 4, 4), np.nan)), "not a latent: has values that are not finite"),
        (b"junk", "broken file: "),
        (npy(np.zeros((4, 4, 8))), "not square: "),
    ],
)
def test_unusable_latents_are_named(tmp_path, content, expected):
    folder = fill(tmp_path / "in", {"0.npy": content})
    assert f"0.npy ({expected}" in failure(tmp_path, "latents", folder)


def test_latents_have_the_resolution_they_have(tmp_path):
    folder = fill(tmp_path / "in", {"0.npy": npy(latent(0))})
    assert "the latents are 4 wide, not 32" in failure(tmp_path, "latents", folder, resolution=32)
    assert "no latents in it" in failure(tmp_path, "latents", fill(tmp_path / "p", CLASSES))


# Archives of other tools


def edm_archive(path: Path, labels="full", suffix="png", count: int = 4, **save) -> Path:
    names = [f"00000/img{k:08d}.{suffix}" for k in range(count)]
    files = {name: png(k, **save) for k, name in enumerate(names)}
    pairs = [[name, (3 * k) % 4] for k, name in enumerate(names)]
    content = labels
    if labels in ("full", "none", "short"):
        content = {"full": pairs, "none": None, "short": pairs[:-2]}[labels]
    if content != "absent":
        files["dataset.json"] = json.dumps({"labels": content}).encode()
    return make_zip(path, files, zipfile.ZIP_DEFLATED)


def test_archives_of_other_tools_are_read(tmp_path):
    path = edm_archive(tmp_path / "edm.zip", compress_level=6)
    archive = Archive(path)
    assert archive.name == "edm"
    assert archive.labels.tolist() == [0, 3, 2, 1]
    assert archive.classes == list("0123")
    assert np.array_equal(archive.images(), np.stack([pixels(k) for k in range(4)]))
    with zipfile.ZipFile(path) as file:
        file.extractall(tmp_path / "unpacked")
    unpacked = Archive(tmp_path / "unpacked")
    assert np.array_equal(unpacked.images(), archive.images())
    assert unpacked.sha256 == archive.sha256
    summary, ours = run(tmp_path, "archive", path)
    assert summary["sha256"] == ours.sha256 == archive.sha256
    assert np.array_equal(ours.labels, archive.labels)
    _, smaller = run(tmp_path, "archive", path, resolution=4, resize="box")
    expected = Image.fromarray(pixels(2)).resize((4, 4), Image.Resampling.BOX)
    assert np.array_equal(smaller.images([2])[0], expected)
    for labels in ("none", "absent"):
        assert Archive(edm_archive(tmp_path / "u.zip", labels)).labels is None


def test_what_is_wrong_with_an_archive_is_said(tmp_path):
    def error(path) -> str:
        with pytest.raises(UserError) as caught:
            Archive(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such dataset archive" in error(tmp_path / "none.zip")
    (tmp_path / "text.zip").write_text("hello")
    assert "not a readable zip file" in error(tmp_path / "text.zip")
    assert "holds no images" in error(make_zip(tmp_path / "e.zip", {"dataset.json": b"{}"}))
    assert "2 of 4 have no label, the first is 00000/img00000002.png" in error(
        edm_archive(tmp_path / "short.zip", "short")
    )
    extra = [[f"00000/img{k:08d}.png", 0] for k in range(5)]
    assert "it names 00000/img00000004.png" in error(edm_archive(tmp_path / "long.zip", extra))
    vectors = [[name, [0.5, 0.5]] for name, _ in extra[:4]]
    assert "label vectors are not supported" in error(edm_archive(tmp_path / "v.zip", vectors))
    assert "must be a list of [entry, class]" in error(edm_archive(tmp_path / "w.zip", [1, 2]))
    assert "must be square" in error(edm_archive(tmp_path / "oblong.zip", width=9))
    assert "cannot read 00000/img00000000.png: mode RGBA" in error(
        edm_archive(tmp_path / "rgba.zip", mode="RGBA")
    )
    both = {"a.png": png(), "b.npy": npy(latent(0))}
    assert "both images and latents" in error(make_zip(tmp_path / "both.zip", both))
    assert "dataset.json is not readable" in error(
        make_zip(tmp_path / "j.zip", {"a.png": png(), "dataset.json": b"{"})
    )
    short = {"images": 2, "labels": None}
    assert "speaks of 2 images, but the archive holds 1" in error(
        make_zip(tmp_path / "s.zip", {"a.png": png(), "dataset.json": json.dumps(short).encode()})
    )


def test_entries_that_differ_or_are_damaged_are_named_when_read(tmp_path):
    archive = Archive(make_zip(tmp_path / "a.zip", {"a.png": png(), "b.png": png(0, 9, 9)}))
    with pytest.raises(UserError, match=r"b\.png has shape \[9, 9, 3\], but a\.png has"):
        archive.images()
    path = tmp_path / "out.zip"
    convert({"source": "folder"}, path, fill(tmp_path / "in", CLASSES))
    Archive(path).verify()
    content = bytearray(path.read_bytes())
    content[content.rindex(b"IDAT") + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read 00000/img00000003\.png: its check sum"):
        Archive(path).verify()


def test_verify_notices_content_that_was_exchanged(tmp_path):
    _, archive = run(tmp_path, "folder", fill(tmp_path / "in", CLASSES))
    with zipfile.ZipFile(archive.path) as file:
        files = {name: file.read(name) for name in file.namelist()}
    files["00000/img00000000.png"] = png(77)
    with pytest.raises(UserError, match="does not match the sha256"):
        Archive(make_zip(tmp_path / "changed.zip", files)).verify()


# Labels


def labelled(archive: Archive) -> dict[str, list[int]]:
    """The seeds of the images (`pixels`) by the name of the class that they came out with."""
    seeds = {pixels(seed).tobytes(): seed for seed in range(40)}
    found: dict[str, list[int]] = {}
    for image, label in zip(archive.images(), archive.labels, strict=True):
        found.setdefault(archive.classes[label], []).append(seeds[image.tobytes()])
    return {name: sorted(values) for name, values in found.items()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("train/images/cat/1 train/images/dog/1", {"cat": [0], "dog": [1]}),
        ("data/train/images/cat/1 data/train/images/dog/1 data/test/images/cat/1",
         {"cat": [0], "dog": [1]}),
        ("data/images/cat/1 data/images/dog/1", {"cat": [0], "dog": [1]}),
        ("train/cat/1 val/cat/1", {"cat": [0]}),
        ("n01/images/1 n02/images/1 n02/images/2", {"n01": [0], "n02": [1, 2]}),
        ("cat/1 dog/1 @eaDir/1 cat/@eaDir/1 lost+found/1 .ipynb_checkpoints/1 cat/.thumbs/2 "
         "__MACOSX/cat/1 #recycle/1 $RECYCLE.BIN/1", {"cat": [0], "dog": [1]}),
        ("00002/1 00000/1 00001/1", {"00002": [0], "00000": [1], "00001": [2]}),
        ("00003/img00012 00000/img00012", {"00003": [0], "00000": [1]}),
        ("bus/1 train/1", {"bus": [0], "train": [1]}),
    ],
)  # fmt: skip
def test_folders_that_are_classes(tmp_path, names, expected):
    files = {f"{name}.png": png(seed) for seed, name in enumerate(names.split())}
    for source, path in (
        ("folder", fill(tmp_path / "in", files)),
        ("zip", make_zip(tmp_path / "in.zip", files)),
        ("tar", make_tar(tmp_path / "in.tar", files)),
    ):
        summary, archive = run(tmp_path, source, path)
        assert labelled(archive) == expected
        assert summary["labels"].startswith(f"{len(expected)} classes, from folders") or (
            summary["labels"].startswith(f"{len(expected)} classes, from the folders in ")
        )


def test_classes_that_are_numbers_keep_them(tmp_path):
    folder = fill(tmp_path / "in", {f"{k}/1.png": png(k) for k in range(12)})
    _, archive = run(tmp_path, "folder", folder)
    assert archive.classes == [str(k) for k in range(12)]
    assert labelled(archive) == {str(k): [k] for k in range(12)}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("animals/cat/1 animals/dog/1 vehicles/car/1", "(animals/cat, animals/dog), so which"),
        ("cat/1 cat/small/1 dog/1", "hold different folders of their own (cat, cat/small)"),
        ("a/airfield/1 b/bar/1", "hold different folders of their own"),
        ("cat/1 thumbs/1", "the folder thumbs beside the classes looks like previews"),
        ("Cat/1 cat/1", "class folders 'Cat' and 'cat' differ only in case"),
        ("cafe\u0301/1 caf\u00e9/1", r"class folders 'cafe\u0301' and 'caf\xe9' differ only in"),
        ("cat/train/1 dog/train/1", "put the split above them (train/cat, not cat/train)"),
        ("train/1 test/1 extra/1", "test and other splits lie beside the folder 'extra'"),
        ("00000/img00000000 00001/img00001000", "parts of a running number (00000/img00000000"),
        ("00000/00000 01000/01000", "parts of a running number (00000/00000.png)"),
    ],
)
def test_folders_that_may_be_classes_are_asked_about(tmp_path, names, expected):
    files = {f"{name}.png": png(seed) for seed, name in enumerate(names.split())}
    assert expected in failure(tmp_path, "folder", fill(tmp_path / "in", files))
    assert expected in failure(tmp_path, "zip", make_zip(tmp_path / "in.zip", files))


def test_the_advice_about_folders_works(tmp_path):
    files = {"train/1.png": png(0), "test/1.png": png(1), "extra/1.png": png(2)}
    _, archive = run(tmp_path, "folder", fill(tmp_path / "parts", files), split="train")
    assert len(archive) == 1
    files = {"a/cat/1.png": png(0), "a/dog/1.png": png(1), "b/car/1.png": png(2)}
    folder = fill(tmp_path / "nested", files)
    assert labelled(run(tmp_path, "folder", folder / "a")[1]) == {"cat": [0], "dog": [1]}
    summary, archive = run(tmp_path, "folder", folder, labels=False)
    assert (len(archive), summary["labels"]) == (3, "none: labels is false")
    running = {f"0000{k}/img0000{k}000.png": png(k) for k in range(2)}
    assert len(run(tmp_path, "folder", fill(tmp_path / "run", running), labels=False)[1]) == 2


def test_a_summary_says_why_there_are_no_labels(tmp_path):
    flat = fill(tmp_path / "flat", {"train/images/1.png": png(0), "train/images/2.png": png(1)})
    summary, archive = run(tmp_path, "folder", flat)
    assert archive.labels is None
    assert summary["labels"] == "none: all lie in one folder"
    digits = convert({"source": "digits"}, tmp_path / "digits.zip")
    assert digits["labels"] == "10 classes, from the source"


def test_labels_of_a_dataset_json_reach_every_source(tmp_path):
    """In numbered folders, one or several, packed or not, wrapped in a folder or not."""
    for parts in (1, 2):
        names = [f"0000{k % parts}/img{k:08d}.png" for k in range(4)]
        content = {"labels": [[name, (3 * k) % 4] for k, name in enumerate(names)]}
        files = {name: png(k) for k, name in enumerate(names)}
        files["dataset.json"] = json.dumps(content).encode()
        for wrap in ("", "top/"):
            wrapped = {wrap + name: data for name, data in files.items()}
            where = tmp_path / f"{parts}{len(wrap)}"
            folder = fill(where, wrapped)
            zipped = make_zip(where.with_suffix(".zip"), wrapped)
            tar = make_tar(where.with_suffix(".tar"), wrapped)
            for source, path in (
                ("folder", folder),
                ("zip", zipped),
                ("tar", tar),
                ("archive", folder),
                ("archive", zipped),
            ):
                summary, archive = run(tmp_path, source, path)
                assert labelled(archive) == {"0": [0], "3": [1], "2": [2], "1": [3]}
                assert summary["labels"].startswith("4 classes, from ")
                assert summary["labels"].endswith("dataset.json")
    files["dataset.json"] = json.dumps({"labels": None}).encode()
    summary, archive = run(tmp_path, "zip", make_zip(tmp_path / "none.zip", files))
    assert archive.labels is None
    assert summary["labels"] == "none: dataset.json has none"
    files["dataset.json"] = json.dumps({"labels": content["labels"][1:]}).encode()
    assert "1 of 4 images have no label in it, the first is 00000/img00000000.png" in failure(
        tmp_path, "zip", make_zip(tmp_path / "short.zip", files)
    )
    split = {f"{part}/{name}": data for name, data in files.items() for part in ("train", "test")}
    split["train/dataset.json"] = json.dumps(content).encode()
    _, archive = run(tmp_path, "folder", fill(tmp_path / "split", split))
    assert labelled(archive) == {"0": [0], "3": [1], "2": [2], "1": [3]}


def test_a_dataset_json_of_something_else_is_passed_over(tmp_path):
    folder = fill(tmp_path / "in", {**CLASSES, "dataset.json": b'{"title": "pets"}'})
    assert run(tmp_path, "folder", folder)[1].classes == ["ant", "cat", "dog"]


def test_our_own_archive_keeps_labels_and_names_as_any_source(tmp_path):
    _, archive = run(tmp_path, "folder", fill(tmp_path / "in", CLASSES))
    path = archive.path.rename(tmp_path / "ours.zip")
    for source in ("archive", "zip"):
        again = run(tmp_path, source, path)[1]
        assert again.classes == ["ant", "cat", "dog"]
        assert again.sha256 == archive.sha256


def test_latents_keep_their_labels(tmp_path):
    names = [f"0000{k // 2}/img-mean-std-{k:08d}.npy" for k in range(4)]
    files = {name: npy(np.abs(latent(k, 8))) for k, name in enumerate(names)}
    content = {"labels": [[name, 3 - k] for k, name in enumerate(names)]}
    files["dataset.json"] = json.dumps(content).encode()
    _, archive = run(tmp_path, "latents", make_zip(tmp_path / "edm2.zip", files))
    assert archive.labels.tolist() == [3, 2, 1, 0]
    assert archive.moments
    numbers = {f"{k}/0.npy": npy(latent(k)) for k in range(11)}
    _, archive = run(tmp_path, "latents", fill(tmp_path / "numbers", numbers))
    assert sorted(archive.labels.tolist()) == list(range(11))
    buffer = io.BytesIO()
    np.savez(buffer, latents=np.stack([latent(k) for k in range(3)]), y=np.arange(3))
    other = fill(tmp_path / "other", {"a.npz": buffer.getvalue()})
    assert "its array y.npy looks like labels: call it labels" in failure(
        tmp_path, "latents", other
    )
    assert run(tmp_path, "latents", other, labels=False)[1].labels is None
    wrapped = {f"set/{name}/0.npy": npy(latent(k)) for k, name in enumerate(("cat", "dog"))}
    assert run(tmp_path, "latents", fill(tmp_path / "w", wrapped))[1].classes == ["cat", "dog"]
    wrapped["set/1.npy"] = npy(latent(5))
    assert "lie beside the class folders" in failure(
        tmp_path, "latents", fill(tmp_path / "w", wrapped)
    )


# Names and kinds of files


def test_names_in_zips_of_other_systems(tmp_path):
    """Backslashes of Windows; UTF-8 without its flag, and beside a name of code page 437."""
    expected = {"caf\u00e9": [0], "\u732b": [1]}

    def zipped(name: str, change=lambda data: data) -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("caf\u00e9\\", b"")
            file.writestr("caf\u00e9\\1.png", png(0))
            file.writestr("\u732b\\1.png", png(1))
        path.write_bytes(change(path.read_bytes()))
        return path

    def unflagged(data: bytes) -> bytes:
        data = bytearray(data)
        for magic, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            start = data.find(magic)
            while start >= 0:
                data[start + at + 1] &= 0xF7
                start = data.find(magic, start + 4)
        return bytes(data)

    for path in (zipped("a.zip"), zipped("b.zip", unflagged)):
        assert labelled(run(tmp_path, "zip", path)[1]) == expected
    beside = tmp_path / "c.zip"
    with zipfile.ZipFile(beside, "w") as file:
        for seed, name in enumerate(("caf\u00e9", "\u732b")):
            info = zipfile.ZipInfo(f"{seed}QL/1.png")
            real = f"{name}/1.png".encode()
            info.extra = b"up" + (5 + len(real)).to_bytes(2, "little") + b"\1\0\0\0\0" + real
            file.writestr(info, png(seed))
    beside.write_bytes(beside.read_bytes().replace(b"QL/", b"\x94L/"))
    assert labelled(run(tmp_path, "zip", beside)[1]) == expected
    content = {"labels": [["00000\\img0.png", 1], ["00000\\img1.png", 0]]}
    files = {"00000\\img0.png": png(0), "00000\\img1.png": png(1)}
    files["dataset.json"] = json.dumps(content).encode()
    archive = Archive(make_zip(tmp_path / "edm.zip", files))
    assert archive.entries == ["00000/img0.png", "00000/img1.png"]
    assert archive.labels.tolist() == [1, 0]


def test_avif_is_read(tmp_path):
    pytest.importorskip("PIL._avif")
    data = png(1, 16, 16, format="AVIF", quality=100, subsampling="4:4:4")
    folder = fill(tmp_path / "in", {"a.avif": data})
    _, archive = run(tmp_path, "folder", folder)
    assert np.array_equal(archive.images([0])[0], np.asarray(Image.open(io.BytesIO(data))))
    deep = bytearray(data)
    deep[data.index(b"av1C") + 6] |= 0x40  # says that it has ten bits
    folder = fill(tmp_path / "deep", {"a.avif": bytes(deep)})
    assert "a.avif (unsupported mode: 10 or 12 bits per channel" in failure(
        tmp_path, "folder", folder
    )


def test_image_files_that_are_not_read_are_named(tmp_path):
    folder = fill(tmp_path / "in", {"a/1.png": png(0), "b/2.HEIC": b"?", "b/3.jxl": b"?"})
    message = failure(tmp_path, "folder", folder)
    assert "2 items cannot be used (2 unread format): b/2.HEIC (unread format: convert" in message
    fill(folder, {"b/1.png": png(1), "readme.txt": b"hello"})
    summary, archive = run(tmp_path, "folder", folder, on_error="skip")
    assert (summary["skipped"], summary["ignored"], len(archive)) == (2, 1, 2)
    phone = fill(tmp_path / "phone", {"1.jpg": b"\0\0\0\x18ftypheic" + bytes(40)})
    assert "1.jpg (broken image: heic, which is not read: save as PNG)" in failure(
        tmp_path, "folder", phone
    )


def deep_tiff() -> bytes:
    """A TIFF of 8 x 8 RGB pixels with 16 bits per channel, uncompressed."""
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, 200), (277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 1, 384)]
    head = b"II*\0" + struct.pack("<I", 16) + struct.pack("<HHHxx", 16, 16, 16)
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return (head + body + bytes(4)).ljust(200, b"\0") + bytes(384)


def deep_png() -> bytes:
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(8 * 49))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", deep_png()),
        ("a.tiff", deep_tiff()),
        ("a.ppm", b"P6 8 8 65535\n" + bytes(384)),
        ("a.ppm", b"P3 8 8 65535\n" + b"0 " * 192),
    ],
)
def test_sixteen_bits_are_never_cut_to_eight(tmp_path, name, content):
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert image.mode == "RGB"  # Pillow reads it without a word
    assert "16 bits per channel" in failure(
        tmp_path, "folder", fill(tmp_path / "in", {name: content})
    )
    zipped = make_zip(tmp_path / "a.zip", {name: content})
    with pytest.raises(UserError, match=f"cannot read {name}: 16 bits per channel"):
        Archive(zipped)


def test_only_decoders_of_the_known_formats_are_asked(tmp_path, monkeypatch):
    """Pillow would start Ghostscript for PostScript under any name."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "EpsImageFile", None)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    folder = fill(tmp_path / "in", {"a.png": content})
    assert "a.png (broken image: not an image of" in failure(tmp_path, "folder", folder)


# Damage


def test_a_tar_without_its_end_is_cut_short(tmp_path):
    whole = make_tar(tmp_path / "a.tar", CLASSES).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as file:
        starts = [member.offset for member in file][1:]
    for end in starts:
        (tmp_path / "a.tar").write_bytes(whole[:end])
        message = failure(tmp_path, "tar", tmp_path / "a.tar")
        assert "not a readable tar file (it is cut short or damaged: its end mark" in message


def test_a_damaged_database_is_refused(tmp_path):
    """Cut at every page, and each page of its tree exchanged for another."""
    lmdb = pytest.importorskip("lmdb")
    path = tmp_path / "church_lmdb"
    with lmdb.open(str(path)) as database, database.begin(write=True) as transaction:
        for seed in range(150):
            side = 48 if seed % 50 == 0 else 8
            transaction.put(f"{seed * 7919 % 997:040x}".encode(), png(seed % 40, side, side))
    whole = (path / "data.mdb").read_bytes()
    pages = len(whole) // 4096
    sha256 = run(tmp_path, "lsun", path, resolution=8)[1].sha256
    for page in range(pages):
        (path / "data.mdb").write_bytes(whole[: 4096 * page])
        assert "not a readable LMDB (cut short" in failure(tmp_path, "lsun", path, resolution=8)
        other = whole[: 4096 * page] + bytes(4096) + whole[4096 * (page + 1) :]
        (path / "data.mdb").write_bytes(other)
        said = ""
        try:
            found = convert({"source": "lsun", "resolution": 8}, tmp_path / "x.zip", path)
        except UserError as error:
            said = str(error)
        # Accepted only where the page was not in use.
        assert ("damaged" in said or "broken image" in said) if said else found["sha256"] == sha256


# Reading


def test_images_by_index(digits):
    archive = Archive(digits[1])
    everything = archive.images()
    assert everything.dtype == np.uint8
    assert everything.shape == (1797, 8, 8, 1)
    picked = [5, 5, 1796, 0]
    lazily = archive.images(picked)
    assert np.array_equal(lazily, everything[picked])
    assert archive.images([]).shape == (0, 8, 8, 1)
    assert archive.images(3).shape == (1, 8, 8, 1)
    resident = archive.resident()
    assert np.array_equal(resident, everything)
    assert resident is archive.resident()
    assert np.array_equal(archive.images(picked), lazily)
    archive.images()[:] = 0  # a copy: the resident array stays
    assert np.array_equal(archive.images(), everything)
    for index in (-1, 1797):
        with pytest.raises(IndexError, match="indices 0 to 1796"):
            archive.images([index])
    assert archive.nbytes == 1797 * 64
    assert archive.fits()
    assert archive.fits(1797 * 64)
    assert not archive.fits(1797 * 64 - 1)


def test_batch_is_scaled_and_channels_first(tmp_path):
    import torch

    _, archive = run(tmp_path, "folder", fill(tmp_path / "in", CLASSES))
    for _ in range(2):
        x, labels = archive.batch(np.array([3, 1]))
        assert x.dtype == torch.float32
        assert x.shape == (2, 3, 8, 8)
        assert x.is_contiguous()
        expected = archive.images([3, 1]).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        assert np.array_equal(x.numpy(), expected)
        assert x.min() >= -1
        assert x.max() <= 1
        assert labels.dtype == torch.int64
        assert labels.tolist() == [2, 1]
        archive.resident()


SHARED_ARCHIVE: list[Archive] = []


def _total(index: int) -> int:
    return int(SHARED_ARCHIVE[0].images([index]).astype(int).sum())


def test_one_archive_serves_forked_processes_threads_and_copies(digits):
    archive = Archive(digits[1])
    expected = archive.images().reshape(1797, -1).astype(int).sum(1)[:200].tolist()
    SHARED_ARCHIVE[:] = [archive]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_total, range(200)) == expected
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(_total, range(200))) == expected
    archive.resident()
    blob = pickle.dumps(archive)
    assert len(blob) < archive.nbytes
    assert np.array_equal(pickle.loads(blob).images([7]), archive.images([7]))


# Order


def test_every_epoch_is_a_permutation_and_pieces_make_the_whole():
    size = 23
    stream = order(5, 0, 4 * size, size)
    assert stream.dtype == np.int64
    epochs = stream.reshape(4, size)
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    for batch in (1, 7, 50):
        pieces = [order(5, start, batch, size) for start in range(0, 90 - batch, batch)]
        joined = np.concatenate(pieces)
        assert np.array_equal(joined, stream[: len(joined)])
    assert not np.array_equal(order(6, 0, size, size), epochs[0])
    assert order(5, 3, 0, size).shape == (0,)


def test_the_order_is_fixed_for_good():
    """Finished runs are compared with later ones: these numbers must never change."""
    assert order(0, 0, 12, 10).tolist() == [7, 9, 1, 3, 4, 8, 5, 6, 0, 2, 4, 7]
    expected = [233, 439, 554, 42, 725, 952, 509, 291]
    assert reference_indices(0, 3, 8, 1000).tolist() == expected


def test_order_refuses_nonsense():
    for arguments in ((0, -1, 1, 5), (0, 0, -1, 5), (0, 0, 1, 0)):
        with pytest.raises(ValueError, match="are not a stream"):
            order(*arguments)


def test_callers_cannot_damage_the_cached_order():
    first = order(1, 0, 10, 10)
    first[:] = 0
    assert sorted(order(1, 0, 10, 10)) == list(range(10))


@pytest.mark.parametrize(("count", "size"), [(8, 1000), (700, 1000), (1000, 1000), (1, 1), (0, 5)])
def test_reference_indices_are_distinct_and_a_function_of_the_step(count, size):
    indices = reference_indices(3, 17, count, size)
    assert indices.dtype == np.int64
    assert len(indices) == count == len(set(indices.tolist()))
    assert all(0 <= index < size for index in indices)
    order(3, 0, 5, size)
    assert np.array_equal(indices, reference_indices(3, 17, count, size))
    assert np.array_equal(indices, reference_indices(3, 17, size, size)[:count])


def test_reference_indices_differ_by_step_and_seed_and_cover_the_set():
    one = reference_indices(0, 0, 50, 1000)
    assert not np.array_equal(one, reference_indices(0, 1, 50, 1000))
    assert not np.array_equal(one, reference_indices(1, 0, 50, 1000))
    counts = np.zeros(20, int)
    for step in range(2000):
        counts[reference_indices(0, step, 5, 20)] += 1
    # 500 expected per image with a standard deviation of about 19.
    assert (abs(counts - 500) < 100).all()


def test_reference_indices_leave_out_the_training_batch():
    batch = order(0, 0, 12, 20)
    extra = reference_indices(0, 0, 8, 20, exclude=batch)
    assert sorted([*batch, *extra]) == list(range(20))
    with pytest.raises(UserError, match="needs 9 images beside 12 training images, but the"):
        reference_indices(0, 0, 9, 20, exclude=batch)


# Real images at full size


@pytest.mark.skipif(
    not (SHARED / "cifar10-jpeg-test.zip").is_file(), reason="the CIFAR-10 JPEG zip is not here"
)
def test_a_zip_of_real_jpegs(tmp_path):
    summary, archive = run(
        tmp_path, "zip", SHARED / "cifar10-jpeg-test.zip", name="cifar10-jpeg", max_images=1000
    )
    assert summary["images"] == 1000
    assert summary["skipped"] == 0
    assert (archive.resolution, archive.channels) == (32, 3)
    assert archive.classes == sorted(archive.classes)
    assert archive.classes[0] == "airplane"
    assert np.bincount(archive.labels).tolist() == [100] * 10
    archive.verify()
