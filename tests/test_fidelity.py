"""Fidelity: definitions, the classifier, extractors, references and the evaluation."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import urllib.error
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset

from study.data import Archive
from study.data.archive import encode_png
from study.data.convert import convert
from study.fidelity import classifier, extractors, neighbours, points
from study.fidelity import evaluate as evaluation
from study.fidelity import reference as references
from study.fidelity.evaluate import evaluate, measure, metric_name
from study.fidelity.extractors import extract, torch_fidelity
from study.fidelity.reference import Reference, make_reference
from study.files import UserError, sha256

ROOT = Path(__file__).parents[1]


def write_archive(path, images, labels=None, **meta):
    """A dataset archive as other tools write it: no hash, no keys of ours but those in ``meta``."""
    with zipfile.ZipFile(path, "w") as file:
        names = [f"00000/img{index:08d}.png" for index in range(len(images))]
        for name, image in zip(names, images, strict=True):
            file.writestr(name, encode_png(image))
        pairs = None if labels is None else [[n, int(v)] for n, v in zip(names, labels)]
        file.writestr("dataset.json", json.dumps({"labels": pairs, **meta}))
    return path


def write_samples(folder, images, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "samples.npz", arr_0=images, arr_1=np.zeros(len(images), np.int64))
    if facts:
        (folder / "generate.json").write_text(json.dumps(facts))
    return folder / "samples.npz"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    convert({"source": "digits"}, path)
    return path


@pytest.fixture(scope="module")
def trained(digits):
    """The classifier as the workflow trains it, and its record."""
    path = digits.with_name("digits.classifier.safetensors")
    return path, classifier.train_classifier(digits, path)


@pytest.fixture(scope="module")
def small(digits, trained):
    """300 digits with their reference: (images, archive, reference folder)."""
    archive = Archive(digits)
    images, labels = archive.images(range(300)), archive.labels[:300]
    path = write_archive(digits.with_name("small.zip"), images, labels, split="train")
    folder = digits.with_name("small.digits")
    make_reference(path, "digits", trained[0], folder)
    return images, path, folder


@pytest.fixture
def features():
    """Generated [40, 6], reference [50, 6] and logits [40, 4] that overlap."""
    draw = np.random.RandomState(3)
    reference = (draw.randn(50, 6) @ draw.randn(6, 6)).astype(np.float32)
    generated = (draw.randn(40, 6) @ draw.randn(6, 6) + 0.3).astype(np.float32)
    return generated, reference, draw.randn(40, 4).astype(np.float32)


# Metrics


def test_numbers_are_torch_fidelitys(features):
    """Of its own functions, called with the features themselves."""
    generated, logits, reference = (torch.from_numpy(features[i]) for i in (0, 2, 1))
    scores = measure(generated, logits, reference)
    options = {"kid_subsets": 100, "kid_subset_size": 40, "prc_neighborhood": 3, "verbose": False}
    kid = torch_fidelity.metric_kid.kid_features_to_metric(generated, reference, **options)
    inception = torch_fidelity.metric_isc.isc_features_to_metric(logits)
    prc = torch_fidelity.metric_prc.prc_features_to_metric(generated, reference, **options)
    for name, found in (("kid", kid), ("is", inception)):
        assert [scores[name].value, scores[name].spread] == pytest.approx(list(found.values()))
    for name in ("precision", "recall"):
        assert scores[name].value == pytest.approx(prc[name])
    assert 0 < scores["precision"].value < 1


def test_precision_and_recall_are_torch_fidelitys_in_blocks(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    reference = torch.randn(700, 48, generator=draw)
    generated = torch.cat([1.3 * torch.randn(500, 48, generator=draw), reference[:30]])
    plain = torch_fidelity.metric_prc.prc_features_to_metric(
        generated, reference, prc_neighborhood=3, prc_batch_size=10000, verbose=False
    )
    monkeypatch.setattr(neighbours, "BLOCK", 96)
    limits = neighbours.radii(reference)
    found = neighbours.precision_recall(generated, reference, limits)
    assert found == (plain["precision"], plain["recall"])
    assert min(found) > 0.1 and max(found) < 1


def test_what_a_metric_needs_of_a_reference_is_computed_once(small, tmp_path, monkeypatch):
    images, _, folder = small
    shutil.copytree(folder, tmp_path / "reference")
    samples = write_samples(tmp_path, np.roll(images, 1, axis=2)[:50])
    given = (samples, tmp_path / "reference", {"extractor": "digits"}, tmp_path / "f.json")
    first = evaluate(*given)["metrics"]
    counted = Mock(side_effect=neighbours.radii)
    monkeypatch.setattr("study.fidelity.reference.radii", counted)
    assert evaluate(*given)["metrics"] == first and counted.call_count == 0
    kept = tmp_path / "reference" / "radii.safetensors"
    save_file({"radii": torch.zeros(300)}, kept, {"features_sha256": "of others"})
    assert evaluate(*given)["metrics"] == first and counted.call_count == 1
    kept.write_bytes(b"damaged")
    assert evaluate(*given)["metrics"] == first and counted.call_count == 2
    assert evaluate(*given)["metrics"] == first and counted.call_count == 2
    kept.unlink()
    kept.mkdir()  # nothing can be kept
    assert evaluate(*given)["metrics"] == first and counted.call_count == 3


# Reference points


def test_reference_points_rank_as_they_must(digits, trained, tmp_path):
    make_reference(digits, "digits", trained[0], tmp_path / "reference")
    given = digits, tmp_path / "reference", tmp_path / "points.json"
    found = points.reference_points(*given, images=400, metrics=("fd", "prc"))["points"]
    assert 0.1 < found["real"]["fd"] < 1
    assert 10 < found["gaussian"]["fd"] < 20 < found["noise"]["fd"] < 40
    assert found["real"]["recall"] > found["gaussian"]["recall"] > found["noise"]["recall"]
    whole = points.reference_points(*given, metrics=("fd",))
    assert whole["images"] == 1797 and abs(whole["points"]["real"]["fd"]) < 1e-6
    assert whole["metrics"] == {"fd": "fd_digits_1797"}


def test_a_gaussian_has_the_moments_of_the_pixels(small):
    images, path, _ = small
    archive = Archive(path)
    drawn = points._Drawn(4000, points.gaussian(archive, 0))
    rows, pixels = drawn[0:4000].reshape(4000, -1), images.reshape(300, -1)
    middle = (pixels.mean(0) > 60) & (pixels.mean(0) < 200)  # where little is clipped
    assert np.abs(rows.mean(0) - pixels.mean(0))[middle].max() < 12
    ratio = rows.std(0)[middle] / pixels.std(0)[middle]
    assert ratio.min() > 0.75 and ratio.max() < 1.1  # clipping takes some
    own, theirs = (np.corrcoef(one[:, middle].T) for one in (rows, pixels))
    assert np.abs(own - theirs).max() < 0.15
    assert np.array_equal(drawn[5:7], drawn[0:9][5:7])  # an image is a function of its number


def test_real_images_come_once_before_any_comes_twice(small):
    images, path, _ = small
    real = points._Drawn(300, points.real(Archive(path), 0))[0:300]
    assert not np.array_equal(real, images)
    assert sorted(one.tobytes() for one in real) == sorted(one.tobytes() for one in images)


def test_points_of_other_images_are_refused(small, digits, tmp_path):
    given = small[2], tmp_path / "points.json"
    with pytest.raises(UserError, match="a reference of other images than those of"):
        points.reference_points(digits, *given)
    with pytest.raises(UserError, match=r"no metric 'foo'; there are fd, kid, is, prc"):
        points.reference_points(small[1], *given, metrics=("fd", "foo"))


# Classifier


def test_classifier_learns_digits(trained, digits):
    path, record = trained
    assert record["accuracy"] >= 0.97
    assert record["split"]["training"] + record["split"]["held_out"] == 1797
    assert record["sha256"] == sha256(path)
    assert json.loads(path.with_suffix(".json").read_text()) == json.loads(json.dumps(record))
    # The accuracy on record is that of the file, on the images on record.
    archive = Archive(digits)
    _, held_out = classifier.split(archive.labels)
    found = extract(extractors.load("digits", path), archive.images(held_out))
    wrong = (found["logits"].argmax(1) != torch.from_numpy(archive.labels[held_out])).sum()
    assert wrong == record["errors"]


def test_features_are_scaled_to_unit_variance(trained, digits):
    archive = Archive(digits)
    training, _ = classifier.split(archive.labels)
    found = extract(extractors.load("digits", trained[0]), archive.images(training))["features"]
    assert found.shape == (len(training), classifier.FEATURES)
    assert found.var(0).mean() == pytest.approx(1, rel=1e-5)
    assert torch.linalg.matrix_rank(torch.cov(found.T.double())) == classifier.FEATURES


def test_split_is_stratified_and_complete():
    labels = np.array([0, 1] * 25 + [2] * 4)
    training, held_out = classifier.split(labels)
    assert sorted([*training, *held_out]) == list(range(54))
    assert np.bincount(labels[held_out], minlength=3).tolist() == [5, 5, 0]


def test_classifier_bytes_depend_on_seed_and_data_only(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "_STEPS", 12)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            classifier.train_classifier(digits, tmp_path / f"{name}.safetensors", seed, required=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert (torch.get_rng_state() == before).all()
    content = {path.stem: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert content["a"] == content["b"] != content["c"]


def test_a_classifier_that_did_not_learn_is_not_written(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "_STEPS", 2)
    out = tmp_path / "x.classifier.safetensors"
    with pytest.raises(UserError, match=r"right on .*% of \d+ held-out images, needs 97%"):
        classifier.train_classifier(digits, out)
    assert list(tmp_path.iterdir()) == []


def test_classifier_takes_other_archives(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "_STEPS", 3)
    draw = np.random.RandomState(0)
    images = draw.randint(0, 256, (20, 11, 11, 3)).astype(np.uint8)
    path = write_archive(tmp_path / "colours.zip", images, [0, 1] * 10)
    out = tmp_path / "c.safetensors"
    assert classifier.train_classifier(path, out)["options"]["channels"] == 3
    assert extract(extractors.load("digits", out), images)["logits"].shape == (20, 2)
    with pytest.raises(UserError, match="no labels"):
        classifier.train_classifier(write_archive(tmp_path / "plain.zip", images), out)
    with pytest.raises(UserError, match="at least two classes"):
        classifier.train_classifier(write_archive(tmp_path / "one.zip", images, [0] * 20), out)


# Extractors


def test_features_do_not_depend_on_the_company_of_an_image(trained, digits):
    images = Archive(digits).images(range(300))
    extractor = extractors.load("digits", trained[0])
    whole = extract(extractor, images)
    order = np.random.RandomState(0).permutation(300)
    shuffled = extract(extractor, images[order])
    single = extract(extractor, images[7:8])
    direct = extractor(torch.from_numpy(images[5:16]).permute(0, 3, 1, 2))
    for layer, column in (("features", 0), ("logits", 1)):
        assert (shuffled[layer] == whole[layer][order]).all()
        assert (single[layer] == whole[layer][7]).all()
        assert (direct[column] == whole[layer][5:16]).all()  # other batch sizes as well


def test_grey_images_may_come_as_three_equal_channels(trained, digits):
    images = Archive(digits).images(range(10))
    extractor = extractors.load("digits", trained[0])
    assert (
        extract(extractor, images)["features"]
        == extract(extractor, images.repeat(3, 3))["features"]
    ).all()
    coloured = images.repeat(3, 3).copy()
    coloured[0, 0, 0, 0] ^= 1
    with pytest.raises(UserError, match="grey"):
        extract(extractor, coloured)
    with pytest.raises(UserError, match="1 x 8 x 8, these are 1 x 16 x 16"):
        extract(extractor, images.repeat(2, 1).repeat(2, 2))


def test_no_images_have_features_without_rows(trained):
    found = extract(extractors.load("digits", trained[0]), np.zeros((0, 8, 8, 1), np.uint8))
    assert found["features"].shape == (0, 64)
    assert found["logits"].shape == (0, 10)


def test_pixels_extractor():
    images = np.zeros((3, 16, 16, 1), np.uint8)
    images[1] = 255
    images[2, :2, :2] = 255
    found = extract(extractors.load("pixels"), images)
    assert list(found) == ["features"]
    assert found["features"].shape == (3, 64)
    assert found["features"][1].eq(1).all()
    assert found["features"][2].tolist() == [1.0] + [0.0] * 63


def test_mistakes_about_extractors(tmp_path, trained):
    for call, message in (
        (lambda: extractors.load("vgg"), "no extractor 'vgg'; there are digits, inception, pixels"),
        (lambda: extractors.load("digits"), "needs --weights"),
        (lambda: extractors.load("digits", tmp_path / "none"), "no such file"),
        (lambda: extractors.load("pixels", trained[0]), "takes no weights"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"not a classifier")
    with pytest.raises(UserError, match="not a classifier"):
        extractors.load("digits", other)
    with pytest.raises(UserError, match="expected uint8"):
        extractors.load("pixels")(torch.zeros(1, 3, 8, 8))


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_inception_weights_are_checked_before_they_are_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"is not torch-fidelity's Inception network; FID needs"):
        extractors.load("inception", path)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(UserError, match="no such file"):
        extractors.load("inception", tmp_path / "missing.pth")


def test_inception_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        UserError, match=r"cannot be downloaded .*no route.*: give the file"
    ) as error:
        extractors.load("inception")
    assert "\n" not in str(error.value)


def test_inception_is_torch_fidelitys_network(tmp_path, monkeypatch):
    """With random weights, as the real ones are not in the repository."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    path = tmp_path / "weights.pth"
    cls = torch_fidelity.FeatureExtractorInceptionV3
    monkeypatch.setattr(cls, "load_state_dict", lambda self, _: None)
    torch.save({}, path)
    plain = cls("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
    monkeypatch.undo()
    torch.save(plain.state_dict(), path)
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", sha256(path))
    monkeypatch.setattr(extractors.Inception, "batch", 2)
    images = np.random.RandomState(0).randint(0, 256, (2, 8, 8, 1)).astype(np.uint8)
    found = extract(extractors.load("inception", path, "cpu"), images)
    with torch.no_grad():
        want = plain(torch.from_numpy(images).permute(0, 3, 1, 2).repeat(1, 3, 1, 1))
    assert found["features"].shape == (2, 2048)
    assert (found["features"] == want[0]).all()
    assert (found["logits"] == want[1]).all()
    assert metric_name("fd", "inception", 50_000) == "fid_50000"
    assert metric_name("kid", "inception", 50_000) == "kid_50000"


def test_exact_arithmetic_is_undone(monkeypatch):
    torch.set_float32_matmul_precision("high")
    try:
        with extractors.exact_arithmetic():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.backends.cudnn.allow_tf32


# Reference


def test_reference_holds_features_and_statistics(small, trained):
    images, path, folder = small
    known = Reference(folder)
    assert known.features.shape == (300, 64)
    assert known.identity["extractor_sha256"] == sha256(trained[0])
    assert known.identity["dataset_sha256"] == Archive(path).sha256
    assert known.identity["images"] == 300
    assert known.identity["split"] == "train"
    values = known.features.double().numpy()
    assert known.statistics["mean"].numpy() == pytest.approx(values.mean(0))
    assert known.statistics["covariance"].numpy() == pytest.approx(np.cov(values.T))
    direct = extract(extractors.load("digits", trained[0]), images)["features"]
    assert (known.features == direct).all()


def test_reference_is_computed_once_per_content(small, trained, tmp_path, monkeypatch):
    images, path, _ = small
    folder = tmp_path / "reference"
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return extract(*arguments, **options)

    monkeypatch.setattr(extractors, "extract", counted)
    first = make_reference(path, "digits", trained[0], folder)
    assert make_reference(path, "digits", trained[0], folder) == first
    assert len(calls) == 1

    changed = images.copy()
    changed[0, 0, 0, 0] ^= 1  # one bit of one image, under the same name
    again = make_reference(
        write_archive(tmp_path / "small.zip", changed, split="train"), "digits", trained[0], folder
    )
    assert again["identity"]["dataset_sha256"] != first["identity"]["dataset_sha256"]
    assert len(calls) == 2

    stored = folder / references.FEATURES_FILE
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="not a complete reference"):
        Reference(folder)
    make_reference(tmp_path / "small.zip", "digits", trained[0], folder)
    assert len(calls) == 3
    assert Reference(folder).features.shape == (300, 64)


def test_reference_refuses_what_it_cannot_measure(tmp_path):
    one = write_archive(tmp_path / "one.zip", np.zeros((1, 8, 8, 1), np.uint8))
    with pytest.raises(UserError, match="at least two"):
        make_reference(one, "pixels", None, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "latents.zip", "w") as file:
        for index in range(2):
            np.save(tmp_path / "x.npy", np.zeros((4, 2, 2), np.float32))
            file.write(tmp_path / "x.npy", f"00000/img{index:08d}.npy")
    with pytest.raises(UserError, match="latents"):
        make_reference(tmp_path / "latents.zip", "pixels", None, tmp_path / "out")
    with pytest.raises(UserError, match="not a complete reference"):
        Reference(tmp_path / "out")


# Evaluation


class PlainImages(Dataset):
    """What a user of torch-fidelity would pass: uint8 [3, H, W]."""

    def __init__(self, images):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).repeat(1, 3, 1, 1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_precomputed_features_give_torch_fidelitys_own_numbers(small, trained, tmp_path):
    """Bit for bit those of `calculate_metrics` on the images, with our extractor registered."""
    images, _, folder = small
    generated = np.roll(images, 1, axis=2)[:250]
    found = evaluate(
        write_samples(tmp_path, generated), folder, {"extractor": "digits"}, tmp_path / "f.json"
    )["metrics"]
    plain = torch_fidelity.calculate_metrics(
        input1=PlainImages(generated),
        input2=PlainImages(images),
        feature_extractor=extractors.registered("digits"),
        feature_extractor_weights_path=str(trained[0]),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=250,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    assert found == {
        "fd_digits_250": plain[torch_fidelity.KEY_METRIC_FID],
        "kid_digits_250": plain[torch_fidelity.KEY_METRIC_KID_MEAN],
        "is_digits_250": plain[torch_fidelity.KEY_METRIC_ISC_MEAN],
        "precision_digits_250": plain[torch_fidelity.KEY_METRIC_PRECISION],
        "recall_digits_250": plain[torch_fidelity.KEY_METRIC_RECALL],
    }


def test_every_number_carries_its_identity(small, tmp_path):
    images, path, folder = small
    facts = {"sampler": {"kind": "edm_heun"}, "nfe": 19, "weights": "ema", "precision": "bf16"}
    out = tmp_path / "fidelity.json"
    record = evaluate(write_samples(tmp_path, images, **facts), folder, {}, out)
    assert json.loads(out.read_text())["metrics"] == record["metrics"]
    assert record["status"] == "done"
    assert set(record["identity"]) == set(record["metrics"])
    mine = record["identity"]["kid_digits_300"]
    assert mine["settings"]["subset_size"] == 300
    want = {
        "extractor": "digits",
        "reference_sha256": Archive(path).sha256,
        "split": "train",
        "images": 300,
        "reference_images": 300,
        "sampler": {"kind": "edm_heun"},
        "nfe": 19,
        "weights": "ema",
        "guidance": None,
        "precision": "bf16",
        "extractor_precision": "float64",
        "tool": "torch-fidelity",
    }
    assert {key: mine[key] for key in want} == want
    assert record["metrics"]["fd_digits_300"] == pytest.approx(0, abs=1e-6)
    assert record["metrics"]["precision_digits_300"] == record["metrics"]["recall_digits_300"] == 1


def test_distances_grow_with_noise(small, tmp_path):
    images, _, folder = small
    noise = np.random.RandomState(0).randn(*images.shape)
    values = []
    for level in (0, 10, 30, 90):
        noisy = np.clip(images + level * noise, 0, 255).round().astype(np.uint8)
        protocol = {"extractor": "digits", "metrics": ["fd", "kid"]}
        record = evaluate(write_samples(tmp_path, noisy), folder, protocol, tmp_path / "f.json")
        values.append(list(record["metrics"].values()))
    assert np.all(np.diff(values, axis=0) > 0)


def test_a_diverged_run_is_skipped(small, tmp_path):
    nothing = np.zeros((0, 8, 8, 1), np.uint8)
    samples = write_samples(tmp_path, nothing, status="skipped", reason="diverged at step 7")
    record = evaluate(samples, small[2], {"extractor": "digits"}, tmp_path / "f.json")
    assert record["status"] == "skipped"
    assert record["reason"] == "diverged at step 7"
    assert record["metrics"] == {}


def test_hardly_any_images_give_numbers_or_reasons(small, tmp_path):
    images, _, folder = small
    everything = {"fd", "kid", "is", "precision", "recall"}
    for count, missing in (
        (1, everything),
        (3, {"is", "precision", "recall"}),
        (9, {"is"}),
        (20, set()),
    ):
        samples = write_samples(tmp_path, images[:count])
        record = evaluate(samples, folder, {}, tmp_path / "f.json")
        none = {name.partition("_")[0] for name, v in record["metrics"].items() if v is None}
        assert none == missing
        assert all(record["notes"][f"{name}_digits_{count}"] for name in none)
        assert bool(record["reason"]) == bool(none)
    assert "singular" in record["notes"]["fd_digits_20"]


def test_identical_samples_are_measured(small, tmp_path):
    images, _, folder = small
    samples = write_samples(tmp_path, np.repeat(images[:1], 100, axis=0))
    found = evaluate(samples, folder, {}, tmp_path / "f.json")["metrics"]
    assert found["fd_digits_100"] > 10
    assert found["is_digits_100"] == pytest.approx(1)
    assert found["recall_digits_100"] < 0.05


def test_features_that_are_not_finite_are_named(features):
    generated, reference, logits = (torch.from_numpy(value.copy()) for value in features)
    generated[3, 2] = torch.nan
    logits[5, 0] = torch.inf
    scores = measure(generated, logits, reference)
    assert set(scores) == {"fd", "kid", "is", "precision", "recall"}
    for score in scores.values():
        assert score.value is None
        assert score.note == "features of 2 of 40 images are not finite"


def test_an_extractor_without_classes_gives_no_inception_score(small, tmp_path):
    images, path, _ = small
    make_reference(path, "pixels", None, tmp_path / "reference")
    samples = write_samples(tmp_path / "s", images)
    record = evaluate(samples, tmp_path / "reference", {}, tmp_path / "f.json")
    assert record["metrics"]["is_pixels_300"] is None
    assert record["metrics"]["fd_pixels_300"] == pytest.approx(0, abs=1e-6)
    assert record["reason"] == "the extractor gives no class probabilities"


def test_mistakes_about_samples_and_protocols(small, trained, tmp_path):
    images, _, folder = small
    samples = write_samples(tmp_path, images)
    wide = write_samples(tmp_path / "wide", images.repeat(2, 2))
    floats = write_samples(tmp_path / "floats", images / 255)
    other = tmp_path / "other.safetensors"
    other.write_bytes(trained[0].read_bytes() + b" ")
    (tmp_path / "text.npz").write_text("hello")
    for path, protocol, weights, message in (
        (samples, {"extractor": "inception"}, None, "made with extractor digits, but the protocol"),
        (samples, {"metrics": ["fid"]}, None, "no metric 'fid'; there are fd, kid, is, prc"),
        (samples, {}, other, "not the weights that"),
        (wide, {}, None, "8 x 16 x 1, those of the reference .* 8 x 8 x 1"),
        (floats, {}, None, "arr_0 is float64 .*, expected uint8"),
        (tmp_path / "text.npz", {}, None, "not a samples file"),
        (tmp_path / "none.npz", {}, None, "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(path, folder, protocol, tmp_path / "f.json", weights=weights)
    assert not (tmp_path / "f.json").exists()


def test_kid_subsets_never_exceed_a_set():
    assert evaluation.kid_subset_size(50_000, 10_000) == 1000
    assert evaluation.kid_subset_size(300, 1797) == 300
    assert evaluation.kid_subset_size(1797, 40) == 40


# Imports


def run_with_torchvision(tmp_path, source, code):
    (tmp_path / "torchvision.py").write_text(textwrap.dedent(source))
    code = "import sys\nfrom study.fidelity.torchvision_fix import import_torchvision\n" + code
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_operators_are_declared_only_after_torchvisions_own_error(tmp_path):
    """A stand-in that, as torchvision does, needs both operators while it is imported."""
    source = """
        import torch
        for name in ("nms", "qnms"):
            torch.library.register_fake(f"torchvision::{name}", lambda *_: None)
        loaded = True
    """
    done = run_with_torchvision(tmp_path, source, "print(import_torchvision().loaded)")
    assert done.stdout.strip() == "True", done.stderr


def test_a_torchvision_that_loads_is_left_alone(tmp_path):
    code = "import_torchvision()\nprint('torch' in sys.modules)"
    assert run_with_torchvision(tmp_path, "", code).stdout.strip() == "False"


def test_other_errors_of_torchvision_are_not_hidden(tmp_path):
    source = "raise RuntimeError('no CUDA driver')"
    done = run_with_torchvision(tmp_path, source, "import_torchvision()")
    assert "RuntimeError: no CUDA driver" in done.stderr
    assert "torchvision::nms" not in done.stderr
