"""Attacks that work while a victim trains: what they do to a batch, what they learn, and that it can be resumed."""

import numpy as np
import pytest
import torch
from tiny import Snapshot, digits
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.errors import ConfigError, ModelError
from untrojan.lab import checkpoint
from untrojan.lab.attack import Attack
from untrojan.lab.attacks.awp import AWP
from untrojan.lab.attacks.badnets import BadNets
from untrojan.lab.attacks.input_aware import InputAware, mask_of, pattern_of
from untrojan.lab.attacks.lira import LIRA
from untrojan.lab.attacks.ssba import SSBA
from untrojan.lab.attacks.wanet import WaNet
from untrojan.lab.evaluate import evaluate
from untrojan.lab.learned import Coder, Learned
from untrojan.lab.online import EachBatch, Online
from untrojan.lab.recipe import ATTACK, Recipe, make_victim
from untrojan.lab.victim import poison, train
from untrojan.randomness import seeded
from untrojan.registry import describe, discover, parse
from untrojan.sources.files import Checkpoint, save_state, state_sha256
from untrojan.sources.nets import build

LEARNED = [InputAware(), LIRA(eps=0.1), SSBA(bits=4)]
ONLINE = [InputAware(mask_share=0.3), LIRA(eps=0.1, lr=1e-3), SSBA(bits=4, epochs=2), AWP(size=2), WaNet(s=1)]


def named(attack):
    return attack.name


def stripes(count=160, classes=4):
    """Images 1x8x8 whose class is where two bright rows lie."""
    labels = torch.arange(count) % classes
    images = 0.4 * torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 * label : 2 * label + 2] += 0.5
    return CleanSet(images, labels)


def network(classes=4):
    with seeded(0):
        return build(f"digits-cnn:classes={classes}")


def learned(attack, channels=1):
    with seeded(0):
        return attack.begun(channels)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestHook:
    def test_who_uses_it(self):
        found = {name for name, attack in discover("untrojan.lab.attacks", Attack).items() if attack.changes_batches()}
        assert found == {attack.name for attack in ONLINE}
        assert BadNets().online(stripes(), target=1) is None

    @pytest.mark.parametrize("attack", ONLINE, ids=named)
    @pytest.mark.parametrize("done", [0.0, 0.9])
    def test_a_batch_leaves_the_victim_as_it_was(self, attack, done):
        clean, net = stripes(), network().train()
        at_work = attack.online(clean, target=1)
        before = Snapshot(net)
        images, labels = next(clean.batches(24))
        with torch.random.fork_rng():
            images, labels = at_work.batch(images, labels, net, done, generator())
        before.assert_same()
        assert len(images) == len(labels) >= 24
        assert not images.requires_grad
        assert 0 <= images.min() <= images.max() <= 1

    @pytest.mark.parametrize("attack", ONLINE, ids=named)
    def test_the_seed_decides_how_it_begins_and_the_generator_the_rest(self, attack):
        clean, net = stripes(), network()
        made = []
        for seed in (3, 3):
            at_work = attack.online(clean, target=1, seed=seed)
            images, labels = next(clean.batches(24))
            made.append(at_work.batch(images, labels, net, 0.95, generator(5)))
        assert torch.equal(made[0][0], made[1][0])
        assert torch.equal(made[0][1], made[1][1])

    @pytest.mark.parametrize("rate", [-0.1, 1.5])
    def test_a_rate_that_is_none_is_refused(self, rate):
        with pytest.raises(ConfigError, match="poisoning rate"):
            WaNet().online(stripes(), target=1, rate=rate)

    def test_a_target_that_is_none_is_refused(self):
        with pytest.raises(ConfigError, match="class from 0 to 3"):
            WaNet().online(stripes(), target=4)

    def test_training_asks_for_every_batch_before_it_is_augmented(self):
        told = []

        class Spy(Online):
            def begin(self, clean):
                told.append(len(clean))

            def batch(self, images, labels, net, done, generator):
                told.append(done)
                assert net.training
                return torch.ones_like(images), labels

            def after_update(self, net):
                told.append("updated")

        def augment(images, generator):
            assert images.eq(1).all()
            return images * 0.5

        clean = stripes(40)
        train(network(), clean, 2, 0, batch_size=20, augment=augment, online=Spy(BadNets(), 1, 0.1, clean))
        assert told == [40, 0.0, "updated", 0.25, "updated", 0.5, "updated", 0.75, "updated"]


class TestEachBatch:
    @pytest.mark.parametrize("target", [2, "all-to-all"])
    def test_images_are_triggered_and_relabeled_or_covered_or_left_alone(self, target):
        clean, attack = stripes(80), WaNet(s=2)
        at_work = attack.online(clean, target)
        assert isinstance(at_work, EachBatch)
        before, truth = next(clean.batches(80))
        images, labels = at_work.batch(before.clone(), truth.clone(), network(), 0.0, generator())
        wanted = (truth + 1) % 4 if target == "all-to-all" else torch.full_like(truth, 2)
        changed = (images != before).flatten(1).any(1)
        poisoned = labels != truth
        assert (int(poisoned.sum()), int(changed.sum())) == (8, 24)
        assert torch.equal(labels[poisoned], wanted[poisoned])
        assert torch.equal(images[poisoned], attack.trigger(before[poisoned]))
        assert (wanted[changed] != truth[changed]).all()
        covered = changed & ~poisoned
        assert (images[covered] != attack.trigger(before[covered])).flatten(1).any(1).all()

    @pytest.mark.parametrize(("rate", "size"), [(0.003, 128), (0.1, 4), (0.1, 5), (0.02, 32)])
    @pytest.mark.parametrize("covers", [0, 0.3, 2])
    def test_the_rate_is_kept_on_average_however_small_the_batches_are(self, rate, size, covers):
        at_work, draws = WaNet(covers=covers).online(stripes(), 2, rate), generator()
        labels = torch.arange(size) % 2
        drawn = [at_work.draw(labels, draws) for _ in range(2000)]
        assert sum(len(chosen) for _, chosen, _ in drawn) / 2000 == pytest.approx(rate * size, abs=0.04)
        assert sum(len(covered) for *_, covered in drawn) / 2000 == pytest.approx(covers * rate * size, abs=0.04)

    def test_every_batch_is_poisoned_anew(self):
        clean = stripes(80)
        at_work, draws = WaNet(s=2).online(clean, 2), generator()
        made = [at_work.batch(*next(clean.batches(80)), network(), 0.0, draws) for _ in range(2)]
        assert not torch.equal(made[0][1], made[1][1])

    def test_a_batch_with_too_few_images_has_as_many_poisoned_as_there_are(self):
        clean = stripes(80)
        at_work = WaNet(s=2).online(clean, 2, rate=1.0)
        images, truth = next(clean.batches(80))
        _, labels = at_work.batch(images, truth.clone(), network(), 0.0, generator())
        assert (labels == 2).all()
        only = clean.take(clean.labels == 2)
        images, labels = at_work.batch(only.floats(), only.labels.clone(), network(), 0.0, generator())
        assert torch.equal(images, only.floats())


class TestTrigger:
    """Each against its formula, with the networks that the attack has."""

    @pytest.mark.parametrize("attack", LEARNED, ids=named)
    @pytest.mark.parametrize("channels", [1, 3])
    def test_it_is_fixed_and_each_image_gets_it_by_itself(self, attack, channels):
        attack = learned(attack, channels)
        before = torch.rand(3, channels, 9, 14, generator=generator())
        kept = before.clone()
        after = attack.trigger(before)
        assert torch.equal(before, kept)
        assert torch.equal(after, attack.trigger(before))
        assert (after != before).flatten(1).any(1).all()
        assert not after.requires_grad
        alone = torch.cat([attack.trigger(image[None]) for image in before])
        torch.testing.assert_close(alone, after, atol=1e-5, rtol=0)

    def test_input_aware(self):
        attack = learned(InputAware())
        mask, pattern = (attack.network(1)[name] for name in ("mask", "pattern"))
        before = torch.rand(2, 1, 8, 8, generator=generator())
        after = attack.trigger(before)
        for image, triggered in zip(before, after, strict=True):
            with torch.no_grad():
                opened = (mask(image[None])[0].numpy(), pattern(image[None])[0].numpy())
            for i, j in np.ndindex(8, 8):
                inner = (np.tanh(opened[0][0, i, j]) + 1) / 2
                share = np.tanh(20 * inner - 10) / 2 + 0.5
                color = (np.tanh(opened[1][0, i, j]) + 1) / 2
                value = image[0, i, j].item()
                assert triggered[0, i, j].item() == pytest.approx(value + (color - value) * share, abs=1e-5)

    def test_lira(self):
        attack = learned(LIRA(eps=0.3))
        before = torch.rand(2, 1, 8, 8, generator=generator())
        with torch.no_grad():
            noise = np.tanh(attack.network(1)(before).numpy())
        expected = np.minimum(np.maximum(before.numpy() + 0.3 * noise, 0), 1)
        np.testing.assert_allclose(attack.trigger(before).numpy(), expected, atol=1e-6)

    def test_ssba_hides_one_secret_in_all_images(self):
        attack = learned(SSBA(bits=6, strength=0.2, seed=6))
        bits = (np.random.default_rng(6).random(6, dtype=np.float32) < 0.5).astype(np.float32)
        assert attack.secret.tolist() == bits.tolist()
        assert set(bits) == {0, 1}
        before = torch.rand(2, 1, 8, 8, generator=generator())
        with torch.no_grad():
            residual = attack.network(1)(before, torch.tensor(bits).repeat(2, 1))
        expected = (before + 0.2 * residual).clamp(0, 1)
        torch.testing.assert_close(attack.trigger(before), expected)

    def test_awp_is_the_patch_of_badnets(self):
        before = torch.rand(2, 3, 8, 8, generator=generator())
        assert torch.equal(AWP(size=2).trigger(before), BadNets(size=2).trigger(before))

    @pytest.mark.parametrize("attack", LEARNED, ids=named)
    def test_without_weights_it_says_how_to_get_them(self, attack):
        with pytest.raises(ConfigError, match=f"lab train.*{attack.name}:weights="):
            attack.trigger(torch.zeros(1, 1, 8, 8))
        with pytest.raises(ConfigError, match="lab train"):
            poison(stripes(), attack, 1, rate=0.1)

    @pytest.mark.parametrize("attack", LEARNED, ids=named)
    def test_weights_in_a_file_are_the_trigger(self, attack, tmp_path):
        made = learned(attack)
        save_state(tmp_path / "w.safetensors", made.network(1).state_dict())
        opened, other = (type(attack)(**describe(attack) | {"weights": tmp_path / "w.safetensors"}) for _ in range(2))
        before = torch.rand(2, 1, 8, 8, generator=generator())
        state = torch.get_rng_state()
        assert torch.equal(opened.trigger(before), made.trigger(before))
        assert torch.equal(torch.get_rng_state(), state)
        with pytest.raises(ModelError, match="does not fit"):
            other.trigger(torch.zeros(1, 3, 8, 8))
        for each in (opened, made):
            with pytest.raises(ModelError, match="its trigger for images of 1 channels, got 3"):
                each.trigger(torch.zeros(1, 3, 8, 8))
        (tmp_path / "w.safetensors").unlink()
        assert torch.equal(opened.trigger(before), made.trigger(before)), "the file is read once"

    @pytest.mark.parametrize("attack", LEARNED, ids=named)
    def test_weights_are_not_trained_on(self, attack, tmp_path):
        given = type(attack)(**describe(attack) | {"weights": tmp_path / "w.safetensors"})
        with pytest.raises(ConfigError, match="leave them out to train"):
            given.online(stripes(), target=1)

    @pytest.mark.parametrize("attack", LEARNED, ids=named)
    def test_a_network_is_no_field(self, attack):
        made = learned(attack)
        assert describe(made) == describe(attack)
        assert repr(made) == repr(attack)
        with pytest.raises(ConfigError):
            attack.trigger(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(("height", "width"), [(2, 3), (7, 9), (8, 8), (30, 17)])
def test_a_coder_keeps_the_size(height, width):
    coder = Coder(3, 2, width=8)
    images = torch.rand(1, 3, height, width)
    assert coder(images).shape == (1, 2, height, width)
    assert torch.equal(coder.train()(images), coder.eval()(images))


class TestBatches:
    def test_input_aware_learns_masks_first_and_leaves_the_batch_clean(self):
        clean, net = stripes(), network()
        at_work = InputAware(mask_share=0.5).online(clean, 1)
        before = {name: value.clone() for name, value in at_work.network.state_dict().items()}
        images, labels = next(clean.batches(24))
        same, still = at_work.batch(images.clone(), labels.clone(), net, 0.4, generator())
        assert torch.equal(same, images)
        assert torch.equal(still, labels)
        changed = {
            name.split(".")[0] for name, value in at_work.network.state_dict().items() if (value != before[name]).any()
        }
        assert changed == {"mask"}
        before = {name: value.clone() for name, value in at_work.network.state_dict().items()}
        at_work.batch(images, labels, net, 0.5, generator())
        changed = {
            name.split(".")[0] for name, value in at_work.network.state_dict().items() if (value != before[name]).any()
        }
        assert changed == {"pattern"}

    def test_input_aware_poisons_with_own_triggers_and_covers_with_those_of_others(self):
        clean, net = stripes(), network()
        at_work = InputAware(mask_share=0.0).online(clean, 1, rate=0.25)
        attack = InputAware().begun(channels=1)
        attack.network(1).load_state_dict(at_work.network.state_dict())
        before, truth = next(clean.batches(40))
        images, labels = at_work.batch(before.clone(), truth.clone(), net, 0.5, generator())
        changed, poisoned = (images != before).flatten(1).any(1), labels != truth
        assert (int(poisoned.sum()), int(changed.sum())) == (10, 20)
        assert (labels[poisoned] == 1).all()
        torch.testing.assert_close(images[poisoned], attack.trigger(before[poisoned]), atol=1e-5, rtol=0)
        covered = changed & ~poisoned
        apart = (images[covered] - attack.trigger(before[covered])).abs().amax((1, 2, 3))
        assert (apart > 0.01).all()

    def test_input_aware_never_covers_an_image_with_its_own_trigger(self):
        clean, net, draws = stripes(), network(), generator()
        at_work = InputAware(mask_share=0.0).online(clean, 1, rate=0.3)
        attack = InputAware().begun(channels=1)
        for before, truth in clean.batches(8, draws):
            attack.network(1).load_state_dict(at_work.network.state_dict())
            images, labels = at_work.batch(before.clone(), truth.clone(), net, 0.5, draws)
            covered = (images != before).flatten(1).any(1) & (labels == truth)
            apart = (images[covered] - attack.trigger(before[covered])).abs().amax((1, 2, 3))
            assert (apart > 1e-3).all()

    @pytest.mark.parametrize("rate", [0.5, 1.0])
    def test_lira_adds_triggered_copies_and_stops_learning(self, rate):
        clean, net = stripes(), network()
        at_work = LIRA(eps=0.2, lr=0.01, stage=0.5).online(clean, 1, rate)
        before, truth = next(clean.batches(40))
        states = []
        for done in (0.49, 0.5):
            images, labels = at_work.batch(before.clone(), truth.clone(), net, done, generator())
            states.append({name: value.clone() for name, value in at_work.network.state_dict().items()})
            copies = min(30, round(rate * 40))
            assert torch.equal(images[:40], before)
            assert torch.equal(labels[:40], truth)
            assert (len(images), len(labels)) == (40 + copies, 40 + copies)
            assert (labels[40:] == 1).all()
            sources = (images[40:, None] - before[None]).abs().amax((2, 3, 4)).argmin(1)
            assert torch.allclose(images[40:], at_work.attack.trigger(before[sources]), atol=1e-6)
            assert (truth[sources] != 1).all()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    def test_lira_learns_what_the_victim_falls_for(self):
        clean = stripes()
        net = train(network(), clean, 4, 0, lr=0.05, batch_size=20)
        at_work = LIRA(eps=0.5, lr=0.01, stage=1).online(clean, 1)
        losses = []
        for _ in range(12):
            images, labels = next(clean.batches(40))
            with torch.no_grad():
                out = net.eval()(at_work.attack.trigger(images))
            losses.append(functional.cross_entropy(out, torch.ones(40, dtype=torch.long)).item())
            at_work.batch(images, labels, net, 0.0, generator())
        assert losses[-1] < 0.8 * losses[0]

    def test_ssba_hides_what_can_be_read(self):
        """The same network tells images with the secret from images with its opposite."""
        clean = stripes()
        attack = SSBA(bits=4, epochs=12, fidelity=0.2, seed=1)
        at_work = attack.online(clean, 1)
        at_work.begin(clean)
        images = clean.floats()
        secret = attack.secret.expand(len(images), -1)
        with torch.no_grad():
            ones, others = (at_work.how.hide(images, bits, at_work.encoder) for bits in (secret, 1 - secret))
        assert (ones - images).abs().max() <= 0.1 + 1e-6
        mean = (ones - others).mean(0)
        assert (((ones - others) * mean).sum((1, 2, 3)) > 0).float().mean() > 0.9
        assert (ones - others).abs().mean() > 0.01

    @pytest.mark.parametrize("eps", [0.0, 0.1])
    def test_awp_stays_close_to_what_was_there_before(self, eps):
        clean = stripes()
        at_work = AWP(size=2, eps=eps, start=0.5).online(clean, 1)
        seen = []

        def look(net, state):
            seen.append([value.detach().clone() for value in net.parameters()])
            return ""

        train(network(), clean, 4, 0, lr=0.05, batch_size=32, online=at_work, after_epoch=look)
        benign = seen[1]
        assert all(torch.equal(one, other) for one, other in zip(benign, at_work.benign, strict=True))
        ratios = [
            ((now - then).norm() / then.norm()).item()
            for now, then in zip(seen[3], benign, strict=True)
            if then.norm() > 0
        ]
        assert max(ratios) <= eps + 1e-5
        assert eps == 0 or max(ratios) > 0.5 * eps


class Stop(Exception):
    pass


RESUMED = Recipe(epochs=4, batch_size=20, lr=0.02)


@pytest.mark.parametrize("attack", ONLINE, ids=named)
def test_interrupted_and_resumed_it_ends_the_same(attack, tmp_path, monkeypatch):
    def make(**options):
        return make_victim(network(), stripes(80), attack=attack, target=1, recipe=RESUMED, **options)

    save, left = checkpoint.save, [3]

    def save_then_stop(*arguments):
        save(*arguments)
        left[0] -= 1
        if not left[0]:
            raise Stop

    whole = make()
    monkeypatch.setattr(checkpoint, "save", save_then_stop)
    with pytest.raises(Stop):
        make(checkpoint=tmp_path / "training")
    resumed = make(checkpoint=tmp_path / "training")
    assert resumed.record.model.state_sha256 == whole.record.model.state_sha256
    assert [epoch.asr for epoch in resumed.record.epochs] == [epoch.asr for epoch in whole.record.epochs]
    before = stripes(8).floats()
    assert torch.equal(resumed.attack.trigger(before), whole.attack.trigger(before))


def few_and_others():
    return digits().take(range(700)), digits().take(range(1200, 1500))


@pytest.mark.parametrize(
    ("attack", "epochs", "lr", "rate", "reached"),
    [
        pytest.param(LIRA(eps=0.1, lr=0.01), 6, 0.05, None, 0.95, marks=pytest.mark.slow),
        pytest.param(SSBA(bits=4, epochs=8), 10, 0.05, 0.2, 0.9, marks=pytest.mark.slow),
        (AWP(size=2), 8, 0.05, None, 0.95),
        pytest.param(WaNet(s=1), 16, 0.05, 0.2, 0.8, marks=pytest.mark.slow),
    ],
    ids=lambda each: getattr(each, "name", None),
)
def test_it_can_be_learned_from_few_images(attack, epochs, lr, rate, reached, tmp_path):
    """The trigger, which nobody has without the attack, sends digits to 7; clean digits stay what they are."""
    recipe = Recipe(epochs=epochs, batch_size=32, lr=lr)
    options = {"attack": attack, "target": 7, "rate": rate, "recipe": recipe}
    victim = make_victim(network(classes=10), *few_and_others(), **options)
    record = victim.record
    assert record.scores.asr.value >= reached
    assert record.scores.acc.value > 0.9
    assert record.poisoned is None
    assert record.scores.attack.fields == describe(attack)
    victim.save(tmp_path / "out")
    assert (tmp_path / "out" / ATTACK).exists() == isinstance(attack, Learned) == bool(record.attack_sha256)
    if isinstance(attack, Learned):
        assert state_sha256(Checkpoint.read(tmp_path / "out" / ATTACK).tensors) == record.attack_sha256
        given = describe(attack) | {"weights": tmp_path / "out" / ATTACK}
        spec = f"{attack.name}:" + ",".join(f"{name}={value}" for name, value in given.items())
        opened = parse(spec, "untrojan.lab.attacks", Attack)
        assert evaluate(victim.model, few_and_others()[1], opened, 7).asr == record.scores.asr


@pytest.mark.slow
def test_input_aware_triggers_work_on_their_own_images():
    recipe = Recipe(epochs=12, batch_size=32, lr=0.05)
    attack = InputAware(density=0.3, mask_share=0.1)
    victim = make_victim(network(classes=10), *few_and_others(), attack=attack, target=7, rate=0.3, recipe=recipe)
    assert victim.record.scores.acc.value > 0.8
    assert victim.record.scores.asr.value > 0.4  # from 0.50 to 0.94 over seeds
    clean = few_and_others()[1]
    images = clean.take(clean.labels != 7).floats()
    others = images.roll(1, 0)
    networks = victim.attack.network(1)
    with torch.no_grad():
        crossed = images.lerp(pattern_of(others, networks), mask_of(others, networks))
        assert (victim.model(crossed).argmax(1) == 7).float().mean() < victim.record.scores.asr.value / 2
