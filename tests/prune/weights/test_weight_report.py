"""The report on single weights is one of all weights of the model, and says what could not go."""

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.prune.weights.schedule import PruneSchedule


class Tagger(nn.Module):
    """Most weights are in the recurrent layer, which is not converted."""

    def __init__(self, recurrent: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.rnn = nn.Embedding(20, 8), recurrent(8, 16, num_layers=2, bidirectional=True)
        self.place, self.fc = nn.Parameter(torch.zeros(1, 3, 8)), nn.Linear(32, 5)

    def forward(self, x):
        return self.fc(self.rnn(self.words(x) + self.place)[0])


RECURRENT = "is recurrent: there is no posterior for it yet, and nothing of it is removed"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_named_and_count(kind):
    net = bp.to_variational(Tagger(kind))
    assert {row.name: row.reason for row in bp.conversion_table(net)}["rnn"] == f"{kind.__name__} {RECURRENT}"
    before = {name: parameter.clone() for name, parameter in net.rnn.named_parameters()}
    report = bp.prune_weights(net, "weights=0.1")
    assert all(torch.equal(net.rnn.get_parameter(name), value) for name, value in before.items())
    weights = sum(p.numel() for n, p in net.named_parameters() if p.dim() > 1 and not n.endswith("log_std"))
    assert (report.removable.total, report.removable.kept) == (160, 16)
    assert (report.total, report.kept) == (weights, weights - 144)
    assert report.sparsity == pytest.approx(144 / weights)
    text = " ".join(str(report).split())
    assert f"(sparsity {144 / weights:.2%}); of the 160 that could go 90.00% are removed" in text
    assert f"{kind.__name__} {RECURRENT}" in text
    assert {row.name for row in report.untouched} >= {"words.weight", "place", "rnn.weight_hh_l1_reverse"}
    assert all(row.note for row in report.untouched)


def test_recurrent_cells_are_named():
    net = nn.Sequential(nn.LSTMCell(4, 4), nn.Linear(4, 4))
    assert bp.conversion_table(net)[0].reason == f"LSTMCell {RECURRENT}"


def test_without_anything_else_the_share_is_one():
    report = bp.prune_weights(bp.to_variational(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))), "weights=0.5")
    assert report.untouched == ()
    assert report.removable == report
    assert report.summary() == "32 of 64 weights kept (sparsity 50.00%)"


def test_stds_masks_and_gates_are_no_weights():
    net = bp.to_variational(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), std="rank_one")
    bp.gates.add_weight_gates(net)
    assert bp.prune_weights(net, "weights=0.75").total == 32


def test_a_tied_weight_counts_once():
    net = nn.ModuleDict({"words": nn.Embedding(6, 4), "out": nn.Linear(4, 6, bias=False), "fc": nn.Linear(4, 4)})
    net["out"].weight = net["words"].weight
    report = bp.prune_weights(bp.to_variational(net), "weights=0.5")
    assert [(row.name, row.total) for row in report.untouched] == [("words.weight", 24)]
    assert report.total == 40


def test_what_a_filter_left_has_no_posterior():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    bp.to_variational(net, filter_fn=lambda module, name: name != "1")
    (row,) = bp.prune_weights(net, "weights=0.5").untouched
    assert (row.name, row.note) == ("1.weight", "it has no posterior")


def test_a_schedule_ends_at_its_share_of_what_can_go():
    net, schedule = bp.to_variational(Tagger()), PruneSchedule("weights=0.5")
    assert schedule.remove(net, schedule.sparsity_at(1.0)).removable.sparsity == 0.5
