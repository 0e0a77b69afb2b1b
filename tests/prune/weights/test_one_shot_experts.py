"""Single weights of stacked experts, removed in one shot: every expert is fitted to the tokens that reach it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.prune.scores.weights import magnitude
from tests.mixtures import ARRANGEMENTS, EXPERTS, WIDTH, Mixture, of_dense_router

arrangements = pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)
X = torch.randn(512, 4, generator=torch.Generator().manual_seed(1))


class TopOne(Mixture):
    """A mixture whose router sends each row to one expert."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh()
        scores = self.router(x).softmax(-1)
        return self.last(x + self.experts(x, scores * (scores == scores.amax(1, keepdim=True))))


def top_one() -> nn.Module:
    torch.manual_seed(0)
    found = TopOne(fused=False, transposed=False, interleaved=False, gated=False)
    nn.init.normal_(found.router.weight, std=2.0)
    return bp.to_variational(found, filter_fn=lambda _, name: name == "experts").eval()


@torch.no_grad()
@arrangements
@pytest.mark.parametrize("target", ["weights=0.5", "2:4"])
def test_experts_lose_half_of_their_weights_and_less_of_what_they_do_than_by_magnitude(arrangement, target):
    dense = bp.to_variational(arrangement.build(), filter_fn=lambda _, name: name == "experts")
    names = [n for n, p in dense.experts.named_parameters() if p.dim() == 3 and "log_std" not in n]
    cut, alone = copy.deepcopy(dense), copy.deepcopy(dense)
    if target == "2:4":
        report = bp.prune_one_shot(cut, X.split(128), target)
        bp.prune_weights(alone, target, score=magnitude)
        mask = cut.experts.mask("down_proj")
        by_input = mask if not arrangement.options["transposed"] else mask.transpose(1, 2)
        assert (by_input.reshape(-1, 4).sum(1) == 2).all()
        cut_rows = {row.name for row in report.rows if row.kept < row.total}
        assert cut_rows == {"experts.down_proj"}  # 6 inputs, as the others have, are no multiple of 4
    else:
        report = bp.prune_one_shot(cut, X.split(128), target)
        bp.prune_weights(alone, dict.fromkeys((f"experts.{name}" for name in names), 0.5), score=magnitude)
        assert report.removable.sparsity == pytest.approx(0.5, abs=0.01)
        for name in names:
            assert torch.equal(getattr(cut.experts, name) != 0, cut.experts.mask(name))
    whole, now, before = (of_dense_router(dense, net.experts, X) for net in (dense, cut, alone))
    assert F.mse_loss(now, whole) < 0.5 * F.mse_loss(before, whole)


@torch.no_grad()
def test_both_matrices_are_least_squares_over_the_rows_that_the_router_sends_to_the_expert():
    dense, x = top_one(), X[:256]  # all of which are looked at
    cut = copy.deepcopy(dense)
    bp.prune_one_shot(cut, x.split(128), "weights=0.7", scope="layer", damping=1e-7)
    rows = dense.first(x).tanh()
    chosen = dense.router(rows).argmax(1)
    assert len(chosen.unique()) == EXPERTS
    weights = dense.router(rows).softmax(-1).amax(1)
    for expert in range(EXPERTS):
        x = rows[chosen == expert]
        hidden, wanted = (F.relu(x @ net.experts.up_proj[expert].mT) for net in (cut, dense))
        by = weights[chosen == expert, None]
        pairs = ((x, x, "up_proj"), (by * hidden, by * wanted, "down_proj"))
        for given, before, name in pairs:
            found, mask = cut.experts.get_parameter(name)[expert], cut.experts.mask(name)[expert]
            targets = before @ dense.experts.get_parameter(name)[expert].mT
            for row, kept in enumerate(mask):
                best = torch.linalg.lstsq(given[:, kept].double(), targets[:, row].double()).solution
                errors = [
                    F.mse_loss(given[:, kept].double() @ w, targets[:, row].double())
                    for w in (found[row, kept].double(), best)
                ]
                assert float(errors[0]) == pytest.approx(float(errors[1]), rel=0.02, abs=1e-6)


@torch.no_grad()
def test_an_expert_that_no_row_reaches_loses_its_smallest_weights_and_keeps_the_others_as_they_are():
    dense = top_one()
    dense.router.bias[1] = -100.0
    cut = copy.deepcopy(dense)
    bp.prune_one_shot(cut, [X], "weights=0.5", scope="layer")
    for name in ("up_proj", "down_proj"):
        found, before = (net.experts.get_parameter(name)[1] for net in (cut, dense))
        assert torch.allclose(found[found != 0], before[found != 0])
        assert 0.3 < (found == 0).double().mean() < 0.7
        assert before[found == 0].abs().max() < before[found != 0].abs().min()
        assert not torch.allclose(
            cut.experts.get_parameter(name)[0],
            dense.experts.get_parameter(name)[0] * (cut.experts.get_parameter(name)[0] != 0),
        )


@torch.no_grad()
def test_forwards_that_begin_anew_for_each_matrix_find_the_same(monkeypatch):
    dense = bp.to_variational(ARRANGEMENTS[3].build())
    held, anew = copy.deepcopy(dense), copy.deepcopy(dense)
    bp.prune_one_shot(held, X.split(128), "weights=0.5", scope="layer")
    monkeypatch.setattr("bayesprune.laplace.sequence._MAX_HELD", 0)
    monkeypatch.setattr("bayesprune.laplace.sequence._PLENTY", 1e9)
    bp.prune_one_shot(anew, X.split(128), "weights=0.5", scope="layer")
    for name, value in held.named_parameters():
        torch.testing.assert_close(anew.get_parameter(name), value, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_what_is_gone_stays_gone():
    cut = bp.to_variational(ARRANGEMENTS[0].build())
    bp.prune_weights(cut, "weights=0.7", score=magnitude)
    first = {name: cut.experts.mask(name).clone() for name in ("gate_up_proj", "down_proj")}
    report = bp.prune_one_shot(cut, [X], "weights=0.5")
    assert report.removable.sparsity == pytest.approx(0.5, abs=0.01)
    for name, before in first.items():
        assert not (cut.experts.mask(name) & ~before).any()
        assert not cut.experts.get_parameter(name)[~cut.experts.mask(name)].any()


@torch.no_grad()
def test_matrices_whose_inputs_stand_elsewhere_are_left_and_said_so():
    class Twice(Mixture):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).tanh()
            return self.last(x + self.experts(torch.stack([x, -x]), self.router(x).softmax(-1)))

    class First(type(ARRANGEMENTS[4].build().experts)):
        def forward(self, both: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return super().forward(both[0], weights)

    torch.manual_seed(0)
    net = Twice(**ARRANGEMENTS[4].options)
    net.experts.__class__ = First
    report = bp.prune_one_shot(bp.to_variational(net).eval(), [X], "weights=0.5", scope="layer")
    rows = {row.name: row for row in report.rows}
    assert rows["experts.up_proj"].kept == EXPERTS * 16 * WIDTH
    assert "prune_weights takes it" in rows["experts.up_proj"].note
    assert rows["experts.down_proj"].kept == EXPERTS * 16 * WIDTH / 2


def test_experts_with_a_frozen_matrix_are_left_and_said_so():
    net = bp.to_variational(ARRANGEMENTS[0].build())
    net.experts.gate_up_proj.requires_grad_(False)
    report = bp.prune_one_shot(net, [X], "weights=0.5")
    (note,) = (row.note for row in report.rows if row.name == "experts.down_proj")
    assert "another matrix of its experts that is frozen" in note
