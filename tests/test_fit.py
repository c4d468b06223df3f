import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import MultiStepLR

from untrojan.errors import UnreliableWarning
from untrojan.fit import fit, size_with_enough_steps, size_without_single
from untrojan.progress import Lines, reporting

START = torch.linspace(-0.1, 0.1, 12).view(3, 4).sin() * 0.5


def problem(batches=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(5, 3, generator=generator), torch.randint(4, (5,), generator=generator)) for _ in range(batches)
    ]


def run(*, lr=0.1, factor=1.0, epochs=3, data=None, optimizer=None, clip=None, **options):
    data = problem() if data is None else data
    weight = START.clone()

    def step(images, labels):
        logits = images @ weight
        return factor * functional.cross_entropy(logits, labels), logits

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)

    if clip is not None:
        options["project"] = lambda: clip.append(weight.clamp_(-0.15, 0.05).clone())
    done = fit([weight], step, lambda: data, optimizer or sgd, epochs, name="fit", **options)
    return weight.detach(), done


@pytest.mark.parametrize("milestones", [(), (1, 2)])
def test_the_loop_written_out(milestones):
    weight, done = run(schedule=partial(MultiStepLR, milestones=milestones))
    slow, speed, lr, epochs = START, torch.zeros(3, 4), 0.1, []
    for epoch in range(3):
        lr = lr / 10 if epoch in milestones else lr
        losses, right, votes = 0.0, 0, torch.zeros(4)
        for images, labels in problem():
            logits = images @ slow
            losses += functional.cross_entropy(logits, labels).item()
            right += int((logits.argmax(1) == labels).sum())
            votes += torch.bincount(logits.argmax(1), minlength=4)
            gradient = images.T @ (logits.softmax(1) - functional.one_hot(labels, 4)) / len(labels)
            speed = 0.9 * speed + gradient
            slow = slow - lr * speed
        epochs.append((losses / 3, right / 15, (votes / 15).tolist()))
    assert torch.allclose(weight, slow, atol=1e-6)
    for epoch, (loss, accuracy, shares) in zip(done.epochs, epochs, strict=True):
        assert epoch.loss == pytest.approx(loss, abs=1e-6)
        assert (epoch.accuracy, epoch.shares.tolist()) == (pytest.approx(accuracy), pytest.approx(shares))
    assert (done.stopped, done.diverged_at) == (False, None)


def test_a_schedule_can_be_stepped_by_update():
    """Three updates an epoch: a learning rate of 0 from the third on leaves what two updates made."""
    schedule = partial(MultiStepLR, milestones=[2], gamma=0.0)
    weight, _ = run(schedule=schedule, schedule_steps=True, optimizer=partial(torch.optim.SGD, lr=0.1))
    two, _ = run(data=problem()[:2], epochs=1, optimizer=partial(torch.optim.SGD, lr=0.1))
    assert len(problem()) == 3
    assert torch.equal(weight, two)


def test_measures_weigh_batches_by_their_images():
    images, labels = problem(1)[0]
    _, whole = run(lr=1e-12, epochs=1, data=[(images, labels)])
    _, parts = run(lr=1e-12, epochs=1, data=[(images[:1], labels[:1]), (images[1:], labels[1:])])
    assert parts.epochs[0].loss == pytest.approx(whole.epochs[0].loss)
    assert parts.epochs[0].accuracy == whole.epochs[0].accuracy
    assert torch.equal(parts.epochs[0].shares, whole.epochs[0].shares)


def test_a_loss_factor_is_a_learning_rate():
    """RNP's loss factor 0.2 at learning rate 0.2 is learning rate 0.04."""
    one, _ = run(lr=0.04, epochs=20)
    other, _ = run(lr=0.2, factor=0.2, epochs=20)
    assert one.abs().max() > 0.1
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_stop():
    seen = []
    _, done = run(epochs=9, stop=lambda epoch: seen.append(epoch) or len(seen) == 2)
    assert done.stopped
    assert done.epochs == seen
    assert len(seen) == 2


@pytest.mark.parametrize(("stop", "left"), [(None, ", about "), (lambda _: False, ", at most ")])
def test_the_time_left_is_an_upper_bound_where_a_fit_may_stop(capsys, stop, left):
    with reporting(Lines(every=0)):
        run(epochs=2, stop=stop)
    assert left in capsys.readouterr().err


@pytest.mark.parametrize("schedule_steps", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_fit_that_begins_where_another_stood_ends_as_that_one(at, schedule_steps):
    schedule = partial(MultiStepLR, milestones=[2, 4], gamma=0.3)
    options = {"schedule": schedule, "schedule_steps": schedule_steps}
    standings = []

    def take(standing):
        standings.append(copy.deepcopy((standing, weight)))
        return ""

    weight = START.clone()

    def go(tensor, **more):
        def step(images, labels):
            logits = images @ tensor
            return functional.cross_entropy(logits, labels), logits

        sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        return fit([tensor], step, problem, sgd, 4, name="fit", **options, **more)

    whole = go(weight, after_epoch=take)
    standing, then = standings[at - 1]
    assert (len(standing.epochs), standing.steps) == (at, 3 * at)
    rest = go(then, begin=standing)
    assert torch.equal(then, weight)
    assert [epoch[:2] for epoch in rest.epochs] == [epoch[:2] for epoch in whole.epochs]


def test_what_an_epoch_came_to_is_shown(capsys):
    with reporting(Lines(every=0)):
        run(epochs=2, after_epoch=lambda standing: f"epoch {len(standing.epochs)} was good")
    assert capsys.readouterr().err.startswith("fit: 1 of 2, epoch 1 was good, ")


def test_project_after_every_step():
    clipped = []
    weight, _ = run(lr=10.0, epochs=2, clip=clipped)
    assert len(clipped) == 6
    assert (weight.min(), weight.max()) == (pytest.approx(-0.15), pytest.approx(0.05))
    assert torch.equal(weight, clipped[-1])


@pytest.mark.parametrize(("at", "back"), [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1)])
def test_divergence_goes_back_to_where_an_epoch_began_whose_loss_was_finite(at, back):
    data = problem()
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    states, steps = [], []

    def batches():
        states.append({name: value.clone() for name, value in net.state_dict().items()})
        return data

    def step(images, labels):
        logits = net(images)
        steps.append(logits)
        return functional.cross_entropy(logits, labels) * (float("nan") if len(steps) == at + 1 else 1), logits

    with pytest.warns(
        UnreliableWarning, match=f"fit: NaN or infinity at step {at}; went back to the end of epoch {back}"
    ):
        done = fit(
            list(net.parameters()),
            step,
            batches,
            lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            5,
            name="fit",
            buffers=list(net.buffers()),
        )
    assert (done.diverged_at, len(done.epochs), done.stopped) == (at, back, False)
    assert all(torch.equal(value, states[back][name]) for name, value in net.state_dict().items())


def test_a_last_step_that_leaves_the_numbers_is_seen():
    images, labels = problem(1)[0]
    with pytest.warns(UnreliableWarning, match="NaN or infinity at step 1; went back to the end of epoch 0"):
        weight, done = run(lr=3e38, epochs=1, data=[(1e30 * images, labels)])
    assert (done.diverged_at, done.epochs) == (1, [])
    assert torch.equal(weight, START)


@pytest.mark.parametrize("kind", [float("inf"), float("-inf"), float("nan")])
def test_what_was_not_finite_at_the_start_is_no_divergence(kind):
    constant, statistic = torch.full((2,), kind), torch.zeros(1)
    done = run(buffers=[constant, statistic])[1]
    assert (len(done.epochs), done.diverged_at) == (3, None)
    with pytest.warns(UnreliableWarning, match="NaN or infinity at step 3"):
        run(buffers=[constant, statistic], project=lambda: statistic.div_(0))


def test_whole_numbers_are_left_alone():
    weight, order = START.clone(), torch.tensor([3, 1, 0, 2])

    def step(images, labels):
        logits = (images @ weight)[:, order]
        return functional.cross_entropy(logits, labels), logits

    fit([weight, order], step, problem, partial(torch.optim.SGD, lr=0.1), 2, name="fit")
    assert not torch.equal(weight, START)
    assert (order.tolist(), order.requires_grad) == ([3, 1, 0, 2], False)


@pytest.mark.parametrize("norm", [1e9, 0.05])
def test_a_gradient_longer_than_clip_is_shortened_to_it(norm):
    ((images, labels),) = problem(1)
    gradient = images.T @ ((images @ START).softmax(1) - functional.one_hot(labels, 4)) / len(labels)
    assert 0.05 < gradient.norm() < 1e9
    gradient = gradient * min(1, norm / gradient.norm())
    weight = START.clone()

    def step(images, labels):
        logits = images @ weight
        return functional.cross_entropy(logits, labels), logits

    fit([weight], step, partial(problem, 1), partial(torch.optim.SGD, lr=1.0), 1, name="fit", clip=norm)
    assert torch.allclose(weight.detach(), START - gradient, atol=1e-6)


def test_only_the_parameters_get_gradients():
    net = nn.Linear(3, 4)
    scale = torch.ones(4)
    unused = torch.ones(2)

    def step(images, labels):
        logits = net(images) * scale
        return functional.cross_entropy(logits, labels), logits

    fit([scale, unused], step, problem, lambda parameters: torch.optim.SGD(parameters, lr=0.1), 2, name="fit")
    assert not torch.equal(scale, torch.ones(4))
    assert torch.equal(unused, torch.ones(2))
    assert [value.grad for value in net.parameters()] == [None, None]


def test_an_error_in_a_step_comes_out():
    with pytest.raises(ZeroDivisionError):
        run(optimizer=lambda parameters: 1 / 0)


@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_batches_too_large_for_the_memory_go_through_in_halves(message):
    """The gradients of the pieces add up to that of the whole, to the last step of all epochs."""
    seen = []

    def short_of_memory(weight):
        def step(images, labels):
            seen.append(len(images))
            if len(images) > 2:
                raise (torch.OutOfMemoryError if "CUDA" in message else RuntimeError)(message)
            logits = images @ weight
            return functional.cross_entropy(logits, labels), logits

        return step

    weight = START.clone()
    with pytest.warns(UnreliableWarning, match="out of memory: batches of 5 images now go through in 5 pieces"):
        done = fit([weight], short_of_memory(weight), problem, partial(torch.optim.SGD, lr=0.1), 2, name="fit")
    expected, whole = run(optimizer=partial(torch.optim.SGD, lr=0.1), epochs=2)
    assert torch.allclose(weight, expected, atol=1e-6)
    assert done.epochs[1].loss == pytest.approx(whole.epochs[1].loss)
    assert done.epochs[1].accuracy == whole.epochs[1].accuracy
    assert seen[:2] == [5, 3]


@pytest.mark.parametrize(
    ("images", "most", "pieces"),
    [([5], 3, [3, 2]), ([13], 4, [3, 2, 2, 2, 2, 2]), ([9, 3], 3, [3] * 4), ([8, 4], 2, [2] * 6)],
)
def test_no_piece_of_a_batch_is_a_single_image(images, most, pieces):
    """BatchNorm could not take it, nor is the last batch cut into more pieces than it needs."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    went = []

    def step(few, labels):
        if len(few) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        went.append(len(few))
        logits = net(few)
        return functional.cross_entropy(logits, labels), logits

    data = [(torch.randn(count, 3), torch.arange(count) % 4) for count in images]
    with pytest.warns(UnreliableWarning, match=f"out of memory: batches of {images[0]} images"):
        fit(list(net.parameters()), step, lambda: data, partial(torch.optim.SGD, lr=0.1), 1, name="fit")
    assert went == pieces


def test_an_image_too_large_for_the_memory():
    def step(images, labels):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UnreliableWarning), pytest.raises(torch.OutOfMemoryError):
        fit([START.clone()], step, problem, partial(torch.optim.SGD, lr=0.1), 1, name="fit")


@pytest.mark.parametrize("size", [16, 32, 100, 128])
def test_batches_make_enough_steps_and_none_holds_a_single_image(size):
    for count in range(2, 700):
        chosen = size_with_enough_steps(count, size)
        assert 8 <= chosen <= size
        assert count % chosen != 1
        if count > 3 * size:
            assert -(-count // chosen) >= 4


@pytest.mark.parametrize(
    ("count", "size", "chosen"),
    [(97, 32, 31), (9, 8, 7), (57, 8, 6), (9, 128, 9), (5, 2, 3), (7, 3, 4), (400, 128, 128), (344, 128, 86)],
)
def test_batch_sizes(count, size, chosen):
    assert size_with_enough_steps(count, size) == chosen


def test_a_batch_of_a_single_image_makes_all_larger():
    assert [size_without_single(count, 4) for count in (4, 5, 9, 10)] == [4, 5, 5, 4]
