"""EDM's augmentation: what each stage does, its labels, and independence of the batch."""

import math

import pytest
import torch

from study.diffusion.augmentation import (
    AUGMENTATION_LABELS,
    DRAWS,
    SYM6,
    Augmentation,
    AugmentationOptions,
    Draws,
)

NONE = dict.fromkeys(AUGMENTATION_LABELS, 0.0)


def only(p=1.0, **stages) -> Augmentation:
    return Augmentation(AugmentationOptions(p=p, **(NONE | stages)))


def images(count=4, size=16, channels=3) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)) - 0.5


def smooth(size=16) -> torch.Tensor:
    """Slow waves, different along the two axes: the wavelet passes them at any angle."""
    x = torch.linspace(-1, 1, size)
    wave = torch.sin(1.5 * x + 0.3)[None] + 0.5 * torch.cos(2 * x - 0.4)[:, None]
    return wave.expand(4, 3, size, size).contiguous()


def drawn(augmentation, uniform, normal=(), count=4) -> Draws:
    """The same random numbers for every image."""
    assert (len(uniform), len(normal)) == (augmentation.uniforms, augmentation.normals)
    return Draws(torch.tensor([uniform] * count), torch.tensor([list(normal)] * count))


def test_default_is_the_published_setting_with_nine_labels():
    augmentation = Augmentation(0.12)
    assert augmentation.label_dim == augmentation.options.label_dim == 9
    assert augmentation.stages == (
        "xflip", "yflip", "scale", "rotate_frac", "aniso", "translate_frac",
    )  # fmt: skip
    many, labels = augmentation(images(400, 4), range(400))
    assert many.shape == (400, 3, 4, 4)
    share = (labels != 0).float().mean(0)
    assert 0.4 < share[0] < 0.6  # x-flip: always on, half of them
    assert 0.02 < share[1] < 0.11  # y-flip: 6 per cent
    assert ((share[2:] > 0.05) & (share[2:] < 0.2)).all()


def test_probability_zero_changes_nothing():
    given = images()
    result, labels = Augmentation(AugmentationOptions(p=0))(given, range(4))
    assert torch.equal(result, given)
    assert torch.equal(labels, torch.zeros(4, 9))


def test_an_image_does_not_depend_on_its_batch():
    augmentation, given = Augmentation(0.8), images(6)
    seeds = [11, 12, 13, 14, 15, 16]
    together, labels = augmentation(given, seeds)
    for i, seed in enumerate(seeds):
        alone, label = augmentation(given[i : i + 1], [seed])
        assert torch.equal(alone[0], together[i])
        assert torch.equal(label[0], labels[i])
    again, _ = augmentation(given, seeds)
    assert torch.equal(again, together)
    assert (augmentation(given, [1, 2, 3, 4, 5, 6])[0] != together).any()


def test_wavelet_is_orthonormal():
    taps = torch.tensor(SYM6, dtype=torch.float64)
    assert taps.sum().item() == pytest.approx(math.sqrt(2), abs=1e-9)
    for shift in range(0, 12, 2):
        product = (taps[shift:] * taps[: len(taps) - shift]).sum().item()
        assert product == pytest.approx(1.0 if shift == 0 else 0.0, abs=1e-9)


def test_flips():
    given = images()
    x, labels = only(xflip=1).apply(given, drawn(only(xflip=1), [0.6, 0.5]))
    assert torch.equal(x, given.flip(3)) and torch.equal(labels, torch.ones(4, 1))
    y, _ = only(yflip=1).apply(given, drawn(only(yflip=1), [0.6, 0.5]))
    assert torch.equal(y, given.flip(2))
    kept, labels = only(p=0.4, xflip=1).apply(given, drawn(only(xflip=1), [0.6, 0.5]))
    assert torch.equal(kept, given) and not labels.any()


def test_quarter_turns():
    augmentation, given = only(rotate_int=1), images()
    turned = [
        augmentation.apply(given, drawn(augmentation, [(w + 0.5) / 4, 0.0])) for w in range(4)
    ]
    assert torch.equal(turned[0][0], given)
    assert torch.equal(turned[2][0], given.flip(2, 3))
    again, _ = augmentation.apply(turned[1][0], drawn(augmentation, [1.5 / 4, 0.0]))
    assert torch.equal(again, turned[2][0])
    back, _ = augmentation.apply(turned[1][0], drawn(augmentation, [3.5 / 4, 0.0]))
    assert torch.equal(back, given)
    assert [label[0].tolist() for _, label in turned] == [[0, 0], [1, 0], [1, 1], [0, 1]]
    with pytest.raises(ValueError, match="square"):
        augmentation.apply(given[:, :, :8], drawn(augmentation, [0.4, 0.0]))


def test_whole_pixel_shift_reflects_at_the_border():
    augmentation, given = only(translate_int=1), images()
    # u = 1 is a shift by 0.125 * 16 = 2 pixels, u = 0 by -2: right by 2, and down by 2, because a
    # positive number moves up.
    result, labels = augmentation.apply(given, drawn(augmentation, [1.0, 0.0, 0.5]))
    assert torch.equal(result[:, :, 2:, 2:], given[:, :, :-2, :-2])
    assert torch.equal(result[:, :, -1, 1], given[:, :, -3, 1])
    assert torch.equal(result[:, :, 0, 0], given[:, :, 2, 2])
    assert labels[0].tolist() == [1.0, -1.0]


@pytest.mark.parametrize(("x", "y"), [(3, 0), (0, 2), (3, 2), (-3, -2)])
def test_whole_pixel_shift_goes_right_and_up_for_positive_numbers(x, y):
    """A single bright pixel of a wide image: where EDM's code puts it."""
    augmentation = only(translate_int=1, translate_int_max=0.25)
    given = torch.zeros(4, 1, 8, 12)
    given[:, :, 4, 5] = 1
    numbers = [x / (0.25 * 12), y / (0.25 * 8)]
    uniform = [*((number + 1) / 2 for number in numbers), 0.5]
    result, labels = augmentation.apply(given, drawn(augmentation, uniform))
    assert result[0, 0].nonzero().tolist() == [[4 - y, 5 + x]]
    torch.testing.assert_close(labels[0], torch.tensor(numbers), rtol=0, atol=1e-6)


def test_fractional_shift_by_whole_pixels_is_that_shift():
    augmentation, given = only(translate_frac=1), images()
    result, labels = augmentation.apply(given, drawn(augmentation, [0.5], [1.5, -0.5]))
    # 1.5 and -0.5 times 0.125 * 16 pixels: right by 3, up by 1.
    torch.testing.assert_close(result[:, :, :-1, 3:], given[:, :, 1:, :-3], rtol=0, atol=1e-5)
    torch.testing.assert_close(result[:, :, 4, 0], given[:, :, 5, 3], rtol=0, atol=1e-5)
    assert labels[0].tolist() == [1.5, -0.5]


def test_rotation():
    augmentation, given = only(rotate_frac=1), smooth()
    half_turn, labels = augmentation.apply(given, drawn(augmentation, [1.0, 0.5]))
    torch.testing.assert_close(half_turn, given.flip(2, 3), rtol=0, atol=0.06)
    torch.testing.assert_close(labels[0], torch.tensor([-2.0, 0.0]), rtol=0, atol=1e-6)
    quarter, labels = augmentation.apply(given, drawn(augmentation, [0.75, 0.5]))
    torch.testing.assert_close(labels[0], torch.tensor([-1.0, 1.0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(quarter, given.rot90(1, (2, 3)), rtol=0, atol=0.06)
    assert (quarter - given.rot90(-1, (2, 3))).abs().max() > 0.5


def test_scaling_moves_towards_and_from_the_centre():
    augmentation = only(scale=1)
    ramp = torch.linspace(-1, 1, 16).expand(4, 3, 16, 16).contiguous()
    # w = 5 gives the factor 2 ** (0.2 * 5) = 2: in the middle the slope is halved.
    result, labels = augmentation.apply(ramp, drawn(augmentation, [0.5], [5.0]))
    slope = (result[..., 9] - result[..., 6]) / (ramp[..., 9] - ramp[..., 6])
    torch.testing.assert_close(slope, torch.full_like(slope, 0.5), rtol=0, atol=0.02)
    assert labels[0].tolist() == [5.0]


def test_anisotropy_stretches_one_axis_and_squeezes_the_other():
    augmentation = only(aniso=1)
    ramp = torch.linspace(-1, 1, 16)
    across, down = ramp.expand(4, 1, 16, 16), ramp[:, None].expand(4, 1, 16, 16)
    draws = drawn(augmentation, [0.75, 0.5, 0.9], [5.0])  # axis not turned
    wide, labels = augmentation.apply(across.contiguous(), draws)
    tall, _ = augmentation.apply(down.contiguous(), draws)
    step = float(ramp[8] - ramp[7])
    assert float(wide[0, 0, 8, 8] - wide[0, 0, 8, 7]) == pytest.approx(step / 2, rel=0.05)
    assert float(tall[0, 0, 8, 8] - tall[0, 0, 7, 8]) == pytest.approx(step * 2, rel=0.05)
    assert labels[0].tolist() == [5.0, 0.0]
    turned, labels = augmentation.apply(
        across.contiguous(), drawn(augmentation, [0.75, 0.5, 0.1], [5.0])
    )
    assert float(turned[0, 0, 8, 8] - turned[0, 0, 8, 7]) == pytest.approx(step * 2, rel=0.05)
    torch.testing.assert_close(labels[0], torch.tensor([0.0, 5.0]), rtol=0, atol=1e-5)


def test_colour():
    given = images()
    grey = given.mean(1, keepdim=True)
    brighter, _ = (a := only(brightness=1)).apply(given, drawn(a, [0.5], [1.0]))
    torch.testing.assert_close(brighter, given + 0.2)
    stronger, _ = (a := only(contrast=1)).apply(given, drawn(a, [0.5], [2.0]))
    torch.testing.assert_close(stronger, given * 2)
    flipped, _ = (a := only(lumaflip=1)).apply(given, drawn(a, [0.6, 0.5]))
    torch.testing.assert_close(flipped, given - 2 * grey)
    turned, labels = (a := only(hue=1)).apply(given, drawn(a, [0.5 + 1 / 3, 0.5]))
    torch.testing.assert_close(turned, given.roll(1, 1), rtol=0, atol=1e-5)
    assert labels.shape == (4, 2)
    faded, _ = (a := only(saturation=1)).apply(given, drawn(a, [0.5], [-40.0]))
    torch.testing.assert_close(faded, grey.expand_as(given), rtol=0, atol=1e-5)
    single, _ = (a := only(brightness=1, contrast=1)).apply(
        grey, Draws(torch.full((4, 2), 0.5), torch.tensor([[1.0, 2.0]] * 4))
    )
    torch.testing.assert_close(single, (grey + 0.2) * 2)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        only(hue=1).apply(images(channels=4), drawn(only(hue=1), [0.5, 0.5]))


def test_every_stage_together_has_all_labels_and_numbers():
    everything = Augmentation(AugmentationOptions(p=1, **dict.fromkeys(AUGMENTATION_LABELS, 1.0)))
    result, labels = everything(images(), range(4))
    assert labels.shape == (4, sum(AUGMENTATION_LABELS.values()))
    assert torch.isfinite(result).all()
    assert set(DRAWS) == set(AUGMENTATION_LABELS)
