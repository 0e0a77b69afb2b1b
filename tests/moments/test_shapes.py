"""What moves entries moves mean, variance and shared part alike: exact identities."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesprune.moments import Moments, parts, settings
from tests.moments.sampled import exact, near_shared, sampled

IMAGE, TOKENS = ((2, 4, 4, 6), (2, 4, 1, 1)), ((2, 6, 4), (2, 1, 4))


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uncertain(shape: tuple[int, ...], shared: tuple[int, ...] | None = None, seed: int = 0) -> Moments:
    own = tensor(*shape, seed=seed + 1).abs() + 0.1
    if shared is None:
        return Moments(tensor(*shape, seed=seed), own)
    common = tensor(*shared, seed=seed + 2).abs() + 0.1
    return Moments(tensor(*shape, seed=seed), own + common, common)


# function, (shape, shape of the shared part), shape of the result's shared part
VIEWS = {
    "permute": (lambda x: x.permute(0, 2, 3, 1), IMAGE, (2, 1, 1, 4)),
    "transpose": (lambda x: x.transpose(1, 2), TOKENS, (2, 4, 1)),
    "swapaxes": (lambda x: torch.swapaxes(x, 1, 2), TOKENS, (2, 4, 1)),
    "movedim": (lambda x: torch.movedim(x, 1, -1), IMAGE, (2, 1, 1, 4)),
    "mT": (lambda x: x.mT, TOKENS, (2, 4, 1)),
    "T": (lambda x: x[0].T, TOKENS, (4, 1)),
    "t": (lambda x: x[0].t(), TOKENS, (4, 1)),
    "unsqueeze": (lambda x: x.unsqueeze(1), TOKENS, (2, 1, 1, 4)),
    "squeeze": (lambda x: x[:, None].squeeze(1), TOKENS, (2, 1, 4)),
    "select": (lambda x: x.select(0, 1), TOKENS, (1, 4)),
    "narrow": (lambda x: x.narrow(1, 1, 3), TOKENS, (2, 1, 4)),
    "slice": (lambda x: x[:, 1:, ..., ::2], IMAGE, (2, 3, 1, 1)),
    "first token": (lambda x: x[:, 0], TOKENS, (2, 4)),
    "None and ellipsis": (lambda x: x[..., None, :2], TOKENS, (2, 1, 1, 2)),
    "chunk": (lambda x: x.chunk(2, 1)[1], TOKENS, (2, 1, 4)),
    "split": (lambda x: torch.split(x, [4, 2], 1)[0], TOKENS, (2, 1, 4)),
    "split of units": (lambda x: x.split(2, -1)[1], TOKENS, (2, 1, 2)),
    "unbind": (lambda x: x.unbind(0)[1], TOKENS, (1, 4)),
    "iteration": (lambda x: next(iter(x)), TOKENS, (1, 4)),
    "tensor_split": (lambda x: torch.tensor_split(x, 3, 1)[2], TOKENS, (2, 1, 4)),
    "diagonal": (lambda x: x.diagonal(0, 2, 3), IMAGE, (2, 4, 1)),
    "unfold": (lambda x: x.unfold(2, 2, 1), IMAGE, (2, 4, 1, 1, 1)),
    "detach": (lambda x: x.detach(), TOKENS, (2, 1, 4)),
    "data": (lambda x: x.data, TOKENS, (2, 1, 4)),
    "flatten to tokens": (lambda x: x.flatten(2).transpose(1, 2), IMAGE, (2, 1, 4)),
    "tokens to an image": (lambda x: x.transpose(1, 2).reshape(2, 4, 2, 3), TOKENS, (2, 4, 1, 1)),
    "heads": (lambda x: x.view(2, 6, 2, 2).transpose(1, 2), TOKENS, (2, 2, 1, 2)),
    "heads joined": (lambda x: x.transpose(1, 2).flatten(2), ((2, 2, 6, 4), (2, 2, 1, 4)), (2, 1, 8)),
    "unflatten": (lambda x: x.unflatten(1, (2, -1)), TOKENS, (2, 1, 1, 4)),
    "view_as": (lambda x: x.view_as(torch.empty(2, 2, 3, 4)), TOKENS, (2, 1, 1, 4)),
    "ravel": (lambda x: x[:1].ravel(), TOKENS, (24,)),
    "examples and tokens merged": (lambda x: x.reshape(-1, 4), TOKENS, (12, 4)),
    "merged and parted again": (lambda x: x.reshape(-1, 4).view(2, 6, 4), TOKENS, (2, 1, 4)),
    "patches joined": (
        lambda x: x.reshape(2, 4, 2, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).flatten(3),
        IMAGE,
        (2, 1, 1, 16),
    ),
    "roll": (lambda x: torch.roll(x, (1, -1), (2, 3)), IMAGE, (2, 4, 1, 1)),
    "roll units": (lambda x: x.roll(1, 2), TOKENS, (2, 1, 4)),
    "roll flat": (lambda x: x.roll(1), ((2, 3), None), None),
    "flip": (lambda x: x.flip(1, 2), TOKENS, (2, 1, 4)),
    "index_select": (lambda x: x.index_select(1, torch.tensor([3, 1])), TOKENS, (2, 1, 4)),
    "list": (lambda x: x[:, [3, 1]], TOKENS, (2, 1, 4)),
    "list of units": (lambda x: x[..., torch.tensor([3, 1, 1])], TOKENS, (2, 1, 3)),
    "mask": (lambda x: x[:, torch.tensor([True, False, True, True, False, True])], TOKENS, (2, 1, 4)),
    "gather tokens": (lambda x: x.gather(1, torch.tensor([[[2], [0]]]).expand(2, 2, 4)), TOKENS, (2, 1, 4)),
    "take_along_dim": (lambda x: x.take_along_dim(torch.tensor([[[2], [0]]]), 1), TOKENS, (2, 1, 4)),
    "repeat": (lambda x: x.repeat(2, 1, 1), TOKENS, (4, 1, 4)),
    "tile": (lambda x: x.tile(3, 1), TOKENS, (2, 1, 4)),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, dim=2), TOKENS, (2, 1, 8)),
    "repeat_interleave flat": (lambda x: x.repeat_interleave(2), ((2, 3), None), None),
    "expand": (lambda x: x[:, None].expand(2, 3, 6, 4), TOKENS, (2, 3, 1, 4)),
    "broadcast_to": (lambda x: torch.broadcast_to(x, (3, 2, 6, 4)), TOKENS, (3, 2, 1, 4)),
    "grouped queries": (
        lambda x: x[:, :, None].expand(2, 2, 3, 6, 4).reshape(2, 6, 6, 4),
        ((2, 2, 6, 4), (2, 2, 1, 4)),
        (2, 6, 1, 4),
    ),
    "channel_shuffle": (lambda x: nn.ChannelShuffle(2)(x), IMAGE, (2, 4, 1, 1)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), IMAGE, (2, 16, 1, 1)),
    "float": (lambda x: x.double().contiguous().clone(), TOKENS, (2, 1, 4)),
    "cat of units": (lambda x: torch.cat([x, x * 2], -1), TOKENS, (2, 1, 8)),
    "stack": (lambda x: torch.stack([x, x * 2], 1), TOKENS, (2, 2, 1, 4)),
    "replication pad": (lambda x: F.pad(x, (1, 0, 0, 2), mode="replicate"), IMAGE, (2, 4, 1, 1)),
    "crop": (lambda x: F.pad(x, (-1, -1, 0, -1)), IMAGE, (2, 4, 1, 1)),
    "crop to one": (lambda x: F.pad(x, (1 - x.shape[-1], 0)), IMAGE, (2, 4, 1, 1)),
    "pad of units": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), IMAGE, (2, 7, 1, 1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_all_parts_move_alike(name):
    function, (shape, shared_shape), expected = VIEWS[name]
    x = uncertain(shape, shared_shape)
    mean, variance, shared = parts(x)
    result = function(x)
    torch.testing.assert_close(result.mean + 0, function(mean), rtol=0, atol=0)
    factor = function(torch.ones_like(mean)).square() if "cat" in name or "stack" in name else 1
    scaled = function(variance) * factor.sqrt() if isinstance(factor, Tensor) else function(variance)
    torch.testing.assert_close(result.variance, scaled)
    if expected is None:
        assert result.shared is None
        return
    assert result.shared.shape == expected
    moved = function(shared.expand(mean.shape))
    moved = moved * factor.sqrt() if isinstance(factor, Tensor) else moved
    torch.testing.assert_close(result.shared.expand(result.shape), moved)


@pytest.mark.parametrize("name", ["permute", "slice", "heads", "gather tokens", "cat of units", "mask"])
def test_nothing_is_shared_where_nothing_was(name):
    function, (shape, _), _ = VIEWS[name]
    assert function(uncertain(shape)).shared is None


def test_windows_there_and_back():
    """Windows are examples for the layers inside; behind them their pixels are positions of one image again."""
    x = uncertain((2, 4, 6, 3), (2, 1, 1, 3))

    def windows(t):
        return t.view(2, 2, 2, 3, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 3)

    def back(t):
        return t.view(2, 2, 3, 2, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(2, 4, 6, 3)

    parted = windows(x)
    assert parted.shared.shape == (12, 1, 3)
    torch.testing.assert_close(parts(back(parted)), parts(x))


def test_copies_share_all_they_have():
    """Where nothing else is shared; not in a diagonal covariance."""
    x = uncertain((2, 1, 3))
    for copies in (x.expand(2, 4, 3), x.repeat(1, 4, 1)):
        torch.testing.assert_close(copies.shared, x.variance)
        torch.testing.assert_close(copies.mean(1).variance, x.variance.squeeze(1))
    with settings(covariance="diagonal"):
        assert x.expand(2, 4, 3).shared is None


def test_gathered_units_share_nothing():
    assert uncertain(*TOKENS).gather(2, torch.zeros(2, 6, 1, dtype=torch.long)).shared is None


def test_lists_along_two_dimensions():
    """The token of each example, as heads of language models pick it."""
    x = uncertain(*TOKENS)
    index = torch.arange(2), torch.tensor([3, 5])
    picked = x[index]
    torch.testing.assert_close(picked.variance, x.variance[index])
    assert picked.shared is None
    mask = torch.rand(2, 6) > 0.5
    torch.testing.assert_close(x[mask].variance, x.variance[mask])


def test_pixel_shuffle():
    x = uncertain((2, 8, 2, 3), (2, 8, 1, 1))
    result = F.pixel_shuffle(x, 2)
    torch.testing.assert_close(result.variance, F.pixel_shuffle(x.variance, 2))
    torch.testing.assert_close(result.shared, x.shared.reshape(2, 2, 4).mean(2).reshape(2, 2, 1, 1))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat([x, torch.ones(1, 2, 3, dtype=torch.float64)], 1),
        lambda x: F.pad(x, (0, 0, 1, 2)),
        lambda x: F.pad(x, (0, 0, 1, 0), value=2.0),
        lambda x: F.pad(x, (0, 0, -1, 2)),
        lambda x: torch.constant_pad_nd(x, (0, 0, 1, 0), 2.0),
    ],
)
def test_certain_positions_thin_what_is_shared(function):
    x = uncertain((1, 4, 3), (1, 1, 3))
    result = exact(function, x)
    found = sampled(function, x)
    # The mean covariance now counts pairs with positions that do not vary.
    near_shared(result, found, tolerance=0.02)


def test_tokens_of_two_layers_share_along_the_tokens():
    """What was parted joins to what it was."""
    x = uncertain(*TOKENS)
    joined = torch.cat([x[:, :1], x[:, 1:]], 1)
    torch.testing.assert_close(parts(joined), parts(x))


def test_cat_with_an_empty_cache():
    x = uncertain(*TOKENS)
    torch.testing.assert_close(parts(torch.cat([torch.tensor([]), x], dim=-2)), parts(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_leave_the_variance_in_float32(dtype):
    x = Moments(torch.ones(2, 3), torch.full((2, 3), 1e-20), torch.full((1, 3), 1e-21))
    for cast in (x.to(dtype), x.type(dtype), x.to(torch.empty(1, dtype=dtype)), x.type_as(torch.empty(1, dtype=dtype))):
        assert cast.dtype == dtype
        assert cast.variance.dtype == cast.shared.dtype == torch.float32
        torch.testing.assert_close(cast.variance, x.variance, rtol=0, atol=0)
    assert x.double().variance.dtype == torch.float64
    assert torch.ones(2).to(x).dtype == torch.float32
    assert torch.ones(3).expand_as(x).shape == (2, 3)


def test_what_has_no_variance_is_refused():
    x = uncertain((2, 3))
    with pytest.raises(TypeError, match="cannot be viewed as another dtype"):
        x.view(torch.int64)
    for name in ("item", "tolist", "numpy"):
        with pytest.raises(TypeError, match=rf"Tensor\.{name} was called on a tensor with variance"):
            getattr(x, name)()
    with pytest.raises(TypeError, match=r"call it on its \.mean"):
        bool(x[0, 0])


def test_comparisons_see_the_mean():
    x = uncertain((2, 3))
    mean = x.mean + 0
    assert torch.equal(x > 0, mean > 0)
    assert torch.equal(x.argmax(-1), mean.argmax(-1))
    assert torch.equal(x != mean, torch.zeros(2, 3, dtype=torch.bool))
    assert not torch.isnan(x).any()
    assert torch.equal(torch.isfinite(x), torch.isfinite(mean))


def test_attributes_of_autograd():
    mean = torch.ones(2, requires_grad=True)
    made = Moments(mean * 2, torch.ones(2))
    assert made.requires_grad
    assert not made.is_leaf
    assert made.grad_fn is not None
    assert not made.detach().requires_grad
    assert not made.data.requires_grad
    assert Moments(torch.ones(2), torch.ones(2)).is_leaf


def test_windows_that_overlap_in_memory():
    """As Longformer cuts tokens into chunks; positions stay positions."""
    x = uncertain(*TOKENS)

    def windows(t: Tensor) -> Tensor:
        return t.as_strided((2, 2, 4, 4), (24, 8, 4, 1))

    result = windows(x)
    assert torch.equal(result.mean, windows(parts(x).mean))
    assert torch.equal(result.variance, windows(x.variance.contiguous()))
    assert torch.equal(result.shared, x.shared[:, None])
    with pytest.raises(NotImplementedError, match="as_strided reached beside the tensor"):
        Moments(parts(x).mean[:, ::2], 1 + x.variance[:, ::2]).as_strided((2, 4), (24, 1), 4)
