"""The loss of a student against Hinton's formula, what it leaves alone, and what may be a teacher."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.prediction.predict import Prediction
from tests.train.reference import batches, net, stock_net

T, W = 4.0, 0.9
(X, Y), *_ = batches()


class CausalLMOutput(SimpleNamespace):
    """Named as those of transformers are."""


class Tokens(nn.Module):
    """Logits of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)

    def forward(self, input_ids, attention_mask=None):
        return CausalLMOutput(logits=self.table(input_ids))


def by_hand(student, teacher, temperature=T):
    """T^2 * KL of softmaxes at each position, classes last, term by term."""
    p, q = (torch.exp(x / temperature) / torch.exp(x / temperature).sum(-1, keepdim=True) for x in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum(-1)


def student() -> nn.Module:
    model = stock_net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    return model


def tokens() -> tuple[nn.Module, nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Tokens(), Tokens(), {"input_ids": torch.randint(0, 7, (2, 4))}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_hintons(temperature):
    teacher, model = stock_net(), student()
    logits = model(X)
    task = F.cross_entropy(logits, Y)
    found = bp.distillation(teacher, temperature=temperature, weight=W)(logits, X, task)
    expected = W * by_hand(logits, teacher.eval()(X), temperature).mean() + (1 - W) * task
    torch.testing.assert_close(found, expected)
    assert found > (1 - W) * task


def test_the_teacher_alone_needs_no_labels():
    teacher, model = stock_net(), student()
    distill = bp.distillation(teacher, weight=1.0)
    torch.testing.assert_close(distill(model(X), X), by_hand(model(X), teacher.eval()(X)).mean())
    assert abs(distill(teacher(X), X)) < 1e-12
    with pytest.raises(ValueError, match="expected task_loss"):
        bp.distillation(teacher)(model(X), X)
    with pytest.raises(TypeError, match=r"task_loss is a tuple; expected a tensor, .* `\.loss`"):
        bp.distillation(teacher)(model(X), X, (1.0,))


def test_the_gradient_reaches_the_student_alone_and_is_that_of_the_soft_labels():
    teacher, model = stock_net(), student()
    distill = bp.distillation(teacher, weight=1.0)
    logits = model(X).detach().requires_grad_()
    distill(logits, X).backward()
    expected = T * ((logits / T).softmax(-1) - (teacher.eval()(X) / T).softmax(-1)) / len(X)
    torch.testing.assert_close(logits.grad, expected.detach())
    distill(model(X), X).backward()
    assert all(parameter.grad.any() for parameter in model[4:].parameters())
    assert all(parameter.grad is None for parameter in (*teacher.parameters(), *distill.teacher.parameters()))


def test_the_teacher_is_a_copy_that_stays_as_it_was():
    model = stock_net().train()
    modes = [module.training for module in model.modules()]
    distill = bp.distillation(model)
    before = copy.deepcopy(distill.teacher.state_dict())
    expected = copy.deepcopy(model).eval()(X)
    with torch.no_grad():
        model[4].weight.zero_()  # as a removal would
    distill(model(X), X, torch.zeros(()))
    assert modes == [module.training for module in model.modules()]
    assert not any(module.training for module in distill.teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in distill.teacher.state_dict().items())
    assert torch.equal(distill.teacher(X), expected)
    model.distill = distill
    assert model.state_dict().keys() == before.keys()


def test_a_channel_less_changes_nothing_for_the_teacher():
    model = bp.to_variational(stock_net().float())
    distill = bp.distillation(model, weight=1.0)
    expected = distill.teacher(X.float())
    bp.prune_channels(model, X[:1].float(), target="params=0.8")
    small = bp.to_deterministic(model)
    loss = distill(small(X.float()), (X.float(), Y))
    torch.testing.assert_close(loss, by_hand(small(X.float()), expected).mean())


def test_maps_have_their_classes_second_and_a_pixel_may_be_ignored():
    torch.manual_seed(0)
    teacher, model = nn.Conv2d(2, 5, 1), nn.Conv2d(2, 5, 1)
    images, labels = torch.randn(2, 2, 3, 4), torch.randint(0, 5, (2, 3, 4))
    labels[0, 0], labels[1, 2, 3] = -100, -100
    distill = bp.distillation(teacher, weight=1.0)
    each = by_hand(model(images).movedim(1, -1), teacher(images).movedim(1, -1))
    torch.testing.assert_close(distill({"out": model(images)}, images), each.mean())
    torch.testing.assert_close(distill({"out": model(images)}, (images, labels)), each[labels != -100].mean())


def test_a_causal_position_counts_by_the_label_that_it_predicts():
    teacher, model, batch = tokens()
    batch["labels"] = torch.tensor([[-100, -100, 3, 4], [5, 6, 0, -100]])
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    ids = batch["input_ids"]
    each = by_hand(model(ids).logits, teacher(ids).logits)
    distill = bp.distillation(teacher, weight=1.0)
    expected = (each[0, 1] + each[0, 2] + each[1, 1]) / 3
    torch.testing.assert_close(distill(model(ids), batch), expected)
    of_each_token = (each[0, 2] + each[0, 3] + each[1, 1] + each[1, 2]) / 4
    torch.testing.assert_close(distill(model(ids).logits, batch), of_each_token)
    shifted = {"shift_labels": F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)}
    by_name = bp.distillation(lambda input_ids, **others: teacher(input_ids), weight=1.0)
    torch.testing.assert_close(by_name(model(ids), batch | shifted), (each[0, 1] + each[0, 2] + each[1, 1]) / 3)


def test_padding_does_not_count_and_without_it_all_tokens_do():
    teacher, model, batch = tokens()
    ids = batch["input_ids"]
    each = by_hand(model(ids).logits, teacher(ids).logits)
    distill = bp.distillation(teacher, weight=1.0)
    torch.testing.assert_close(distill(model(ids), batch), each.mean())
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    torch.testing.assert_close(distill(model(ids), batch | {"attention_mask": mask}), each[mask.bool()].mean())
    nothing = distill(model(ids), batch | {"attention_mask": torch.zeros_like(mask)})
    nothing.backward()
    assert nothing == 0


def test_the_mask_of_an_encoder_says_nothing_of_the_decoder():
    teacher, model, batch = tokens()
    ids = batch["input_ids"]
    outputs = SimpleNamespace(logits=model(ids).logits, encoder_last_hidden_state=torch.zeros(2, 4, 3))
    batch["attention_mask"] = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    distill = bp.distillation(teacher, weight=1.0)
    torch.testing.assert_close(distill(outputs, batch), by_hand(outputs.logits, teacher(ids).logits).mean())


def test_a_posterior_teaches_its_predictive_distribution():
    posterior, model = net(), student()
    sampled = bp.predict(posterior, X, num_samples=5)
    distill = bp.distillation(lambda x: sampled, weight=1.0)
    p = (sampled.samples / T).softmax(-1).mean(0)
    assert not torch.allclose(p, (sampled.mean / T).softmax(-1), rtol=0, atol=1e-6)
    expected = T**2 * (p * (p.log() - (model(X) / T).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(distill(model(X), (X, Y)), expected)


def test_moments_probabilities_and_their_logarithms_may_teach():
    posterior, model = net(), student()
    moments = bp.distillation(lambda x: bp.predict(posterior, x, method="moments"), weight=1.0)
    p = bp.predict(posterior, X, method="moments").classify(temperature=T).probabilities
    expected = T**2 * (p * (p.log() - (model(X) / T).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(moments(model(X), X), expected)
    classes = bp.predict(posterior, X, num_samples=5).classify()
    logits = classes.probabilities.log()
    for answer in (classes, logits):
        distill = bp.distillation(lambda x, answer=answer: answer, weight=1.0)
        torch.testing.assert_close(distill(model(X), X), by_hand(model(X), logits).mean())


def test_a_certain_teacher_may_say_that_a_class_is_impossible():
    model = student()
    logits = model(X)
    answer = torch.full_like(logits, -math.inf)
    answer[:, 0] = 0
    loss = bp.distillation(lambda x: answer, weight=1.0)(logits, X)
    torch.testing.assert_close(loss, T**2 * F.cross_entropy(logits / T, torch.zeros_like(Y)))


def test_a_class_that_is_masked_in_both_counts_for_nothing():
    model = student()
    masked = torch.zeros(model(X).shape[1], dtype=torch.bool)
    masked[0] = True

    def distilled(logits):
        model.zero_grad()
        loss = bp.distillation(lambda x: answer[:, logits.shape[1] - answer.shape[1] :], weight=1.0)(logits, X)
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in model.parameters()]

    answer = stock_net()(X).detach().masked_fill(masked, -math.inf)
    loss, gradients = distilled(model(X).masked_fill(masked, -math.inf))
    answer = answer[:, 1:]
    expected, expected_gradients = distilled(model(X)[:, 1:])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_draws_of_maps_have_their_classes_second():
    torch.manual_seed(0)
    model, images = nn.Conv2d(2, 5, 1), torch.randn(2, 2, 3, 4)
    samples = torch.randn(6, 2, 5, 3, 4)
    distill = bp.distillation(lambda x: Prediction(samples.mean(0), samples.var(0), samples), weight=1.0)
    p = (samples / T).softmax(2).mean(0)
    expected = T**2 * (p * (p.log() - (model(images) / T).log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(distill(model(images), images), expected)


def test_labels_are_taught_by_sigmoids_and_values_by_squares():
    teacher, model = stock_net(), student()
    soft, logits = (teacher.eval()(X) / T).sigmoid(), model(X)
    p, q = soft, (logits / T).sigmoid()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    labels = bp.distillation(teacher, weight=1.0, likelihood="bernoulli")
    torch.testing.assert_close(labels(logits, X), T**2 * each.mean())
    values = bp.distillation(teacher, weight=1.0, likelihood="gaussian")
    torch.testing.assert_close(values(logits, X), F.mse_loss(logits, teacher(X)))
    posterior = net()
    predicted = bp.distillation(lambda x: bp.predict(posterior, x, method="moments"), weight=1.0, likelihood="gaussian")
    expected = F.mse_loss(logits, bp.predict(posterior, X, method="moments").mean)
    torch.testing.assert_close(predicted(logits, X), expected)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_outputs_of_one_dimension_are_one_label_or_value_for_each_example(likelihood):
    model, x, labels = nn.Linear(3, 1).requires_grad_(False), torch.randn(4, 3), torch.tensor([1, -100, 0, 1])
    flat = nn.Sequential(model, nn.Flatten(0))
    column, row = (bp.distillation(teacher, weight=1.0, likelihood=likelihood) for teacher in (model, flat))
    found = row.divergences(torch.arange(4.0), (x, labels))
    assert found.shape == (3,)
    assert torch.equal(found, column.divergences(torch.arange(4.0)[:, None], (x, labels)))


def test_low_precision_is_compared_in_float32():
    teacher, model = stock_net().float(), student().float()
    distill = bp.distillation(teacher.bfloat16(), weight=1.0)
    found = distill(model.bfloat16()(X.bfloat16()), X.bfloat16())
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"weight": 0.0}, "weight is 0.0"),
        ({"weight": 1.1}, "weight is 1.1"),
        ({"likelihood": "poisson"}, "likelihood is 'poisson'"),
        ({"features": -0.1}, "features is -0.1"),
        ({"features": 0.1}, "numbered blocks"),
        ({"features": {"nowhere": 0.1}}, "names of modules of Sequential"),
    ],
)
def test_options_out_of_range_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        bp.distillation(stock_net(), **options)


def test_what_cannot_be_compared_is_told():
    with pytest.raises(TypeError, match="got a str as teacher"):
        bp.distillation("resnet50")
    model = nn.Linear(3, 1)
    x = torch.randn(2, 3)
    classes = bp.predict(net(), X, num_samples=2).classify()
    with pytest.raises(ValueError, match="probabilities of classes, and the likelihood is 'bernoulli'"):
        bp.distillation(lambda x: classes, weight=1.0, likelihood="bernoulli")(student()(X), X)
    with pytest.raises(ValueError, match='have one class.*"gaussian"'):
        bp.distillation(model, weight=1.0)(model(x), x)
    flat = nn.Sequential(model, nn.Flatten(0))
    with pytest.raises(ValueError, match=r'outputs \(2,\) have one class.*"bernoulli"'):
        bp.distillation(flat, weight=1.0)(flat(x), x)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) and the teacher \(2, 1\)"):
        bp.distillation(model, weight=1.0)(torch.zeros(2, 2), x)


class Blocks(nn.Module):
    """Two blocks of inner width 6 around 4 features, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x, attention_mask=None):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def blocks() -> tuple[Blocks, Blocks, torch.Tensor]:
    torch.manual_seed(0)
    dense, small = Blocks(), Blocks()
    bp.prune_channels(bp.to_variational(small), torch.randn(1, 4), "macs=0.5")
    return dense, bp.to_deterministic(small), torch.randn(5, 4)


def block_outputs(model: Blocks, x: torch.Tensor) -> list[torch.Tensor]:
    """Of each block its output, by hand."""
    found = []
    for block in model.blocks:
        found.append(block(x))
        x = x + found[-1]
    return found


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return (ours - theirs).square().sum() / theirs.square().sum()


def test_features_are_outputs_of_blocks_that_kept_their_width():
    dense, small, x = blocks()
    errors = [relative_error(a, b) for a, b in zip(block_outputs(small, x), block_outputs(dense, x), strict=True)]
    distill = bp.distillation(dense, weight=0.5, features=0.3)
    with distill.watch(small):
        loss = distill(small(x), x, torch.tensor(2.0))
    divergence = by_hand(small(x), dense(x)).mean()
    torch.testing.assert_close(loss, 0.5 * (divergence + 0.3 * sum(errors) / 2) + 0.5 * 2.0)
    gradients = torch.autograd.grad(loss, list(small.parameters()))
    expected = torch.autograd.grad(0.5 * (divergence + 0.3 * sum(errors) / 2), list(small.parameters()))
    torch.testing.assert_close(gradients, expected)
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_named_features_have_weights_of_their_own_and_other_shapes_are_left_out():
    dense, small, x = blocks()
    errors = [relative_error(a, b) for a, b in zip(block_outputs(small, x), block_outputs(dense, x), strict=True)]
    weights = {"blocks.0": 0.2, "blocks.1": 0.7, "blocks.1.0": 9.0}
    distill = bp.distillation(dense, weight=1.0, features=weights)
    with distill.watch(nn.parallel.DataParallel(small).module):
        loss = distill(small(x), x)
    expected = by_hand(small(x), dense(x)).mean() + (0.2 * errors[0] + 0.7 * errors[1]) / 2
    torch.testing.assert_close(loss, expected)


def test_features_of_masked_tokens_do_not_count():
    dense, small, _ = blocks()
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    distill = bp.distillation(dense, weight=1.0, features=0.3)
    with distill.watch(small):
        loss = distill(small(x), {"x": x, "attention_mask": mask})
        x[mask == 0] += 5.0
        torch.testing.assert_close(distill(small(x), {"x": x, "attention_mask": mask}), loss)
        whole = distill(small(x), {"x": x, "attention_mask": torch.ones(2, 3)})
        assert abs(whole - loss) > 0.01 * loss


def test_the_mask_of_an_encoder_says_nothing_of_the_features_of_the_decoder():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, attention_mask=None):
            return self.decoder(self.encoder(x))

    torch.manual_seed(0)
    dense, small, x = Both(), Both(), torch.randn(2, 3, 4)
    ours, theirs = small(x), dense(x)
    distill = bp.distillation(dense, weight=1.0, features={"encoder": 0.0, "decoder": 0.5})
    with distill.watch(small):
        loss = distill(small(x), {"x": x, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])})
    counted = torch.tensor([[True, True, False], [True, False, False]])
    expected = by_hand(ours, theirs)[counted].mean() + 0.5 * relative_error(ours, theirs) / 2
    torch.testing.assert_close(loss, expected)


def test_watching_leaves_no_trace_and_a_copy_in_between_is_a_model_of_its_own():
    dense, small, x = blocks()
    distill = bp.distillation(dense, weight=1.0, features=0.3)
    with distill.watch(small):
        outputs = small(x)
        other = copy.deepcopy(small)
        with torch.no_grad():
            other(x + 1)
        assert distill(outputs, x) > 0
    assert not any(module._forward_hooks for module in small.modules())
    assert not any(module._forward_hooks for module in distill.teacher.modules())
    with pytest.raises(ValueError, match=r"with distill\.watch\(student\)"):
        distill(small(x), x)


def test_without_features_nothing_is_watched():
    dense, small, _ = blocks()
    with bp.distillation(dense, weight=1.0).watch(small):
        assert not any(module._forward_hooks for module in small.modules())


def test_features_that_are_not_there_are_told():
    dense, small, x = blocks()
    distill = bp.distillation(dense, weight=1.0, features=0.3)
    with pytest.raises(ValueError, match=r"Linear has none of the blocks .*\(blocks\.0, blocks\.1\)"):
        distill.watch(nn.Linear(4, 3))
    with distill.watch(small), pytest.raises(ValueError, match="no outputs of equal shape"):
        distill(small(x)[:2], x[:2])
    with pytest.raises(TypeError, match="got a function as teacher"):
        bp.distillation(lambda x: x, features=0.1)
