"""Embeddings are rounded like weights, as exactly as the data say that they have to be known."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.bits.others import embedding_precisions, named_embeddings
from bayesprune.bits.steps import grid_of

pytest.importorskip("constriction")

WORDS, WIDTH, CLASSES = 60, 8, 4


class Reader(nn.Module):
    """The mean of the embeddings of five words, and a layer; tied, its outputs are words."""

    def __init__(self, *, is_tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS if is_tied else CLASSES, bias=False)
        if is_tied:
            self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(words).mean(1))))


@pytest.fixture(scope="module")
def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(WORDS - 1, (192, 5), generator=generator)  # the last word is in no example
    return list(zip(words.split(64), (words.sum(1) % CLASSES).split(64), strict=True))


def reader(**options: bool) -> Reader:
    torch.manual_seed(1)
    return Reader(**options).eval()


@pytest.mark.parametrize("is_tied", [False, True])
def test_precision_is_that_of_the_logits_with_the_prior(data, is_tied):
    model = reader(is_tied=is_tied)
    torch.manual_seed(2)
    words, weight = data[0][0][:6], model.table.weight
    prior = 1 / float(weight.detach().square().mean())
    expected = torch.zeros((), dtype=torch.double)
    for example in words.split(1):
        for logit in model(example)[0]:
            (gradient,) = torch.autograd.grad(logit, weight, retain_graph=True)
            expected += gradient.double().square().mean()
    draws = [
        embedding_precisions(model, [(words, None)], has_own_stds=False)["table.weight"] - prior for _ in range(600)
    ]
    found = torch.tensor(draws)
    assert abs(float(found.mean() - expected)) < 5 * float(found.std()) / len(draws) ** 0.5


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_width_is_that_of_embeddings_too(data, is_tied):
    model = reader(is_tied=is_tied)
    batches = data if not is_tied else [(words, words[:, 0]) for words, _ in data]
    report = bp.quantize(model, batches, bits=4)
    assert len(model.table.weight.unique()) <= 15
    names = [row.name for row in report.tensors]
    assert names.count("table.weight") == 1
    assert is_tied is ("head.weight" not in names)
    assert model.table.weight[-1].any()  # a word that no example has is no worse known than the others


def test_bytes_are_those_of_embeddings_too(data):
    """A table of 480 entries with 11 bits each takes 660 bytes, so these fit only where it is rounded."""
    model = reader()
    report = bp.quantize(model, data, bytes=400)
    assert report.coded_bytes is not None
    assert report.coded_bytes <= 400
    assert grid_of(model.table.weight.detach()) is not None


def test_entries_cost_the_same_as_weights(data):
    model = reader()
    report = bp.quantize(model, data, bytes=500)
    costs = {row.name: row.predicted_cost / row.numel for row in report.tensors if row.numel > 30}
    assert costs.keys() == {"table.weight", "mix.weight", "head.weight"}
    assert max(costs.values()) < 3 * min(costs.values())


def test_without_data_they_keep_eleven_bits(data):
    model = bp.to_variational(reader())
    before = model.table.weight.detach().clone()
    report = bp.quantize(model, bits=4)
    after = model.table.weight.detach()
    assert torch.equal(after.half().float(), after)
    assert float((after / before - 1).abs().max()) <= 2.0**-11
    assert "table.weight" not in [row.name for row in report.tensors]


def test_names_may_leave_them(data):
    model = reader()
    bp.quantize(model, data, bits={"mix": 4, "head": 4})
    after = model.table.weight.detach()
    assert torch.equal(after.half().float(), after)
    model = reader()
    bp.quantize(model, data, bits={"table": 3, "": 8})
    assert len(model.table.weight.unique()) <= 7


def test_a_posterior_sets_the_scale(data):
    """The stds of a posterior that is so many times sharper than the data's make embeddings as much sharper."""
    model, batches = bp.to_variational(reader(), std="per_weight"), data * 40
    torch.manual_seed(0)
    bp.laplace.fit_laplace(model, batches, loss=bp.laplace.output_metric)

    def precision(*, has_own_stds: bool) -> float:
        torch.manual_seed(1)
        return embedding_precisions(model, batches, has_own_stds=has_own_stds)["table.weight"]

    by_data, first = precision(has_own_stds=False), precision(has_own_stds=True)
    assert first == pytest.approx(by_data, rel=0.2)  # other signs are drawn
    with torch.no_grad():
        for posterior in bp.layers.named_posteriors(model):
            for part in posterior.log_std_parts:
                part -= 0.5
    assert precision(has_own_stds=True) == pytest.approx(first * torch.e, rel=1e-4)
    assert precision(has_own_stds=False) == by_data


def test_normalised_embeddings_are_left_alone():
    model = reader()
    model.table.max_norm = 1.0
    assert not named_embeddings(model)


def test_training_holds_them_to_their_grid(data):
    model = reader()
    report = bp.quantize(model, data, bits=3)
    loaded = copy.deepcopy(model)
    for trained, grids in ((model, report), (loaded, None)):  # None finds them
        before = trained.table.weight.detach().clone()
        optimizer = torch.optim.Adam(trained.parameters(), 0.2)
        rounding = bp.bits.StraightThrough(optimizer, trained, grids)
        for words, labels in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(trained(words), labels).backward()
            optimizer.step()
        rounding.finish()
        assert len(trained.table.weight.unique()) <= 7
        assert not torch.equal(trained.table.weight, before)


def test_sparse_gradients_round_and_train_as_dense_ones_do(data):
    found = []
    for is_sparse in (False, True):
        model = reader()
        model.table.sparse = is_sparse
        torch.manual_seed(3)
        report = bp.quantize(model, data, bits=3)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        rounding = bp.bits.StraightThrough(optimizer, model, report)
        for words, labels in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(words), labels).backward()
            optimizer.step()
        found.append(rounding.state_dict()["values"]["table.weight"])
    assert torch.allclose(found[0], found[1], atol=1e-6)


class Speaker(nn.Module):
    """Predicts each next word, and gives the loss where it is told the labels, as causal models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.table(words).tanh())
        if labels is None:
            return {"logits": logits}
        return {
            "logits": logits,
            "loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),
        }


def test_the_loss_of_a_model_that_has_its_own_is_measured():
    torch.manual_seed(0)
    model, words = Speaker().eval(), torch.randint(WORDS, (16, 6))
    with torch.no_grad():
        before = float(model(words, words)["loss"])
        report = bp.quantize(model, [{"words": words, "labels": words}], tolerance=0.01)
        after = float(model(words, words)["loss"])
    assert (report.loss_before, report.loss_after) == pytest.approx((before, after))
    assert after <= before + 0.01
    assert after != before
