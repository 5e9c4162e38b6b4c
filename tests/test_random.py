"""Counter-based draws: uniform, independent between keys, and the same whatever stands beside them."""

import torch

from posttrain.random import categorical, uniform


def keys(n: int) -> torch.Tensor:
    return torch.arange(n)


def test_draws_are_uniform_in_every_bit_that_matters() -> None:
    u = uniform(3, 7, keys(1000).repeat_interleave(200), keys(200).repeat(1000))
    assert u.dtype == torch.float64
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    counts = torch.histc(u, bins=64, min=0, max=1)
    chi_square = float(((counts - 200_000 / 64) ** 2 / (200_000 / 64)).sum())
    assert 30 < chi_square < 110  # 63 degrees of freedom: mean 63, standard deviation 11
    low_bits = (u * 2**40) % 1.0
    assert abs(float(low_bits.mean()) - 0.5) < 0.005


def test_neighbouring_keys_are_uncorrelated() -> None:
    n = 100_000
    base = uniform(0, 0, keys(n), keys(n) * 0)
    others = [
        uniform(0, 0, keys(n) + 1, keys(n) * 0),
        uniform(0, 0, keys(n), keys(n) * 0 + 1),
        uniform(0, 1, keys(n), keys(n) * 0),
        uniform(1, 0, keys(n), keys(n) * 0),
        uniform(0, 0, keys(n), keys(n) * 0, stream=1),
        uniform(0, 0, keys(n) * 0, keys(n)),
        uniform(0, 0, keys(n), keys(n) * 0, draws=2)[:, 1],
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1]
        assert abs(float(correlation)) < 0.015  # 0.003 is one standard deviation


def test_no_two_keys_collide() -> None:
    index, position = keys(500).repeat_interleave(400), keys(400).repeat(500)
    assert uniform(11, 2, index, position).unique().numel() == 200_000


def test_a_draw_does_not_depend_on_its_neighbours_or_on_how_many_are_drawn() -> None:
    whole = uniform(5, 9, keys(10), keys(10) + 3, draws=8)
    assert torch.equal(whole[4:7], uniform(5, 9, keys(10)[4:7], keys(10)[4:7] + 3, draws=8))
    assert torch.equal(whole[:, :3], uniform(5, 9, keys(10), keys(10) + 3, draws=3))
    assert torch.equal(whole[:, 0], uniform(5, 9, keys(10), keys(10) + 3))


def test_numbers_are_pinned() -> None:
    drawn = uniform(1, 2, torch.tensor([3]), torch.tensor([4]), draws=2)
    again = uniform(1, 2, torch.tensor([3]), torch.tensor([4]), draws=2)
    assert torch.equal(drawn, again)
    assert torch.allclose(drawn, torch.tensor([[0.2891583503705589, 0.09841851681372105]], dtype=torch.float64), atol=1e-15)


def test_large_and_negative_seeds_are_taken() -> None:
    u = uniform(2**63 + 5, -1, keys(4), keys(4))
    assert bool(((u >= 0) & (u < 1)).all())


def test_categorical_follows_its_probabilities() -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    n = 100_000
    drawn = categorical(p.expand(n, 4), uniform(0, 0, keys(n), keys(n)))
    share = torch.bincount(drawn, minlength=4) / n
    assert torch.allclose(share, p, atol=0.006)
    assert share[1] == 0
    edge = torch.tensor([[0.0, 1.0, 0.0]])
    assert categorical(edge, torch.tensor([[0.0, 0.999999999]], dtype=torch.float64)).tolist() == [[1, 1]]
