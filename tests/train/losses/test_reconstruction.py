import pytest
import torch

from train.losses.reconstruction import masked_error, patches, standardised


def test_patches_go_by_rows_and_hold_pixels() -> None:
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    found = patches(images, 2)
    assert found.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            square = images[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(found[1, 3 * row + column].view(2, 2, 3), square.permute(1, 2, 0))


def test_standardised_patches_know_no_brightness_and_no_contrast() -> None:
    squares = torch.randn(4, 5, 48, dtype=torch.float64)
    found = standardised(squares)
    torch.testing.assert_close(found.mean(-1), torch.zeros(4, 5).double())
    torch.testing.assert_close(found.var(-1), torch.ones(4, 5).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(standardised(30 * squares + 7), found, rtol=1e-4, atol=1e-5)
    assert standardised(torch.full((1, 1, 48), 0.3)).abs().max() < 1e-3  # of one colour


def test_known_values() -> None:
    """Without any idea of the image the loss is near 1: the targets' mean square, (P - 1) / P."""
    targets = standardised(torch.randn(4, 5, 48, dtype=torch.float64))
    assert masked_error(targets, targets) == 0
    assert masked_error(torch.zeros_like(targets), targets).item() == pytest.approx(47 / 48, rel=1e-4)
