import pytest
import torch
from PIL import Image
from tiny import digits
from torch import nn

from untrojan.data import CleanSet
from untrojan.errors import ConfigError, DataError, ModelError, UnreliableWarning
from untrojan.lab.attack import Attack
from untrojan.lab.attacks.adaptive_blend import AdaptiveBlend
from untrojan.lab.attacks.additive import Additive
from untrojan.lab.attacks.badnets import BadNets
from untrojan.lab.attacks.blend import Blend
from untrojan.lab.attacks.bpp import BppAttack
from untrojan.lab.attacks.dfst import DFST
from untrojan.lab.attacks.feature_collision import FeatureCollision
from untrojan.lab.attacks.ftrojan import FTrojan
from untrojan.lab.attacks.l0_inv import L0Inv
from untrojan.lab.attacks.l2_inv import L2Inv
from untrojan.lab.attacks.label_consistent import LabelConsistent
from untrojan.lab.attacks.low_frequency import LowFrequency
from untrojan.lab.attacks.sig import SIG
from untrojan.lab.attacks.trojan_square import TrojanSquare
from untrojan.lab.attacks.trojan_watermark import TrojanWatermark
from untrojan.lab.attacks.wanet import WaNet
from untrojan.lab.evaluate import evaluate
from untrojan.lab.victim import poison, train
from untrojan.sources.nets import build

PATCH = BadNets(size=2)


def gray(count=40, classes=4, dtype=torch.uint8):
    """Random images 1x6x6 with white pixels left out, so that a white patch always shows."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (count, 1, 6, 6), generator=generator, dtype=torch.uint8)
    pixels = pixels if dtype == torch.uint8 else torch.rand(count, 1, 6, 6, generator=generator) * 0.9
    return CleanSet(pixels, torch.arange(count) % classes, class_names=tuple("abcd"[:classes]))


def two_kinds(count=64):
    """Dark and bright images: what a linear layer can tell apart."""
    labels = torch.arange(count) % 2
    noise = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.3
    return CleanSet(noise + 0.5 * labels[:, None, None, None], labels)


def linear():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 2))


def changed(before, after):
    return (before.images != after.images).flatten(1).any(1)


class TestPoison:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    @pytest.mark.parametrize("target", [0, 3, "all-to-all"])
    @pytest.mark.parametrize("rate", [0, 0.1, 0.33, 0.75])
    def test_every_image_is_either_untouched_or_triggered_and_relabeled(self, dtype, target, rate):
        clean = gray(dtype=dtype)
        poisoned = poison(clean, PATCH, target, rate, seed=0)
        hit = changed(clean, poisoned)
        assert int(hit.sum()) == round(rate * len(clean))
        assert torch.equal(poisoned.labels[~hit], clean.labels[~hit])
        for at in hit.nonzero().flatten().tolist():
            wanted = (int(clean.labels[at]) + 1) % 4 if target == "all-to-all" else target
            assert int(clean.labels[at]) != wanted
            assert int(poisoned.labels[at]) == wanted
            assert torch.equal(poisoned.floats()[at], PATCH.trigger(clean.floats()[at : at + 1])[0])

    def test_type_names_and_the_images_given_stay_as_they_are(self):
        for dtype in (torch.uint8, torch.float32):
            clean = gray(dtype=dtype)
            sha256 = clean.sha256
            poisoned = poison(clean, PATCH, 1, 0.5, seed=0)
            assert clean.sha256 == sha256
            assert poisoned.images.dtype == dtype
            assert poisoned.class_names == clean.class_names

    def test_the_seed_chooses(self):
        clean = gray()
        same = [poison(clean, PATCH, 1, 0.2, seed=5).sha256 for _ in range(2)]
        assert same[0] == same[1]
        assert len({poison(clean, PATCH, 1, 0.2, seed).sha256 for seed in range(5)}) == 5

    def test_the_random_state_is_left_alone(self):
        state = torch.get_rng_state()
        poison(gray(), PATCH, 1, 0.2, seed=5)
        assert torch.equal(torch.get_rng_state(), state)

    def test_every_image_outside_the_target_class_can_be_poisoned_and_no_more(self):
        clean = gray()
        hit = changed(clean, poison(clean, PATCH, 2, 0.75, seed=0))
        assert torch.equal(hit, clean.labels != 2)
        with pytest.raises(DataError, match=r"needs 31 of 40 images, but only 30"):
            poison(clean, PATCH, 2, 31 / 40, seed=0)

    def test_eight_bit_sums_saturate_and_round(self, tmp_path):
        Image.new("L", (6, 6), 100).save(tmp_path / "pattern.png")
        clean = gray()
        poisoned = poison(clean, Additive(image=tmp_path / "pattern.png"), 0, 0.75, seed=0)
        hit = clean.labels != 0
        wanted = (clean.images[hit].int() + 100).clamp(max=255)
        assert torch.equal(poisoned.images[hit].int(), wanted)

        half = poison(clean, BadNets(size=1, value=0.5), 0, 0.75, seed=0)
        assert set(half.images[hit][:, 0, 5, 5].tolist()) == {128}

    @pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
    def test_a_rate_outside_of_0_to_1_is_refused(self, rate):
        with pytest.raises(ConfigError, match="poisoning rate between 0 and 1"):
            poison(gray(), PATCH, 1, rate, seed=0)

    @pytest.mark.parametrize(("rate", "warned"), [(0, 0), (0.01, 1), (0.02, 0)])
    def test_a_rate_that_comes_to_no_image_is_warned_of(self, rate, warned, recwarn):
        poison(gray(), PATCH, 1, rate)
        told = [str(each.message).partition(";")[0] for each in recwarn if each.category is UnreliableWarning]
        assert told == warned * ["nothing is poisoned: a poisoning rate of 0.01 of 40 images rounds to none"]

    def test_a_negative_seed_is_refused(self):
        with pytest.raises(ConfigError, match="seed of at least 0, got -1"):
            poison(gray(), PATCH, 1, 0.1, seed=-1)

    def test_a_target_that_is_no_class_is_refused(self):
        with pytest.raises(ConfigError, match="0 to 3"):
            poison(gray(), PATCH, 4, 0.1, seed=0)


class Marked(Attack):
    """A dark trigger at test time, a bright one in training, and a gray one on cover samples."""

    name = "marked"
    rate = 0.1
    covers = 2.0

    def _trigger(self, images):
        return images.fill_(0)

    def _poisoned(self, few, clean, rng):
        assert len(clean) == 40
        return torch.ones_like(few.floats())

    def _cover(self, few, clean, rng):
        assert 3 not in few.labels, "cover samples are not of the target class"
        return torch.full_like(few.floats(), 0.5)


class CleanLabel(Marked):
    name = "clean-label"
    rate = 0.5
    covers = 0.0
    clean_label = True


class TestPoisonAsTheAttackSays:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_cover_samples_come_on_top_and_keep_their_label(self, dtype):
        clean = gray(dtype=dtype)
        poisoned = poison(clean, Marked(), 3)
        bright, covers = ((poisoned.floats() - value).abs().amax((1, 2, 3)) < 1 / 255 for value in (1, 0.5))
        assert (int(bright.sum()), int(covers.sum())) == (4, 8)
        assert torch.equal(changed(clean, poisoned), bright | covers)
        assert (poisoned.labels[bright] == 3).all()
        assert (clean.labels[bright | covers] != 3).all()
        assert torch.equal(poisoned.labels[~bright], clean.labels[~bright])

    def test_clean_label_attacks_poison_the_target_class_and_change_no_label(self):
        clean = gray()
        poisoned = poison(clean, CleanLabel(), 3)
        hit = changed(clean, poisoned)
        assert int(hit.sum()) == 5, "half of the 10 images of class 3"
        assert (clean.labels[hit] == 3).all()
        assert torch.equal(poisoned.labels, clean.labels)
        assert torch.equal(changed(clean, poison(clean, CleanLabel(), 3, rate=1)), clean.labels == 3)

    def test_clean_label_attacks_have_one_target(self):
        with pytest.raises(ConfigError, match="clean-label poisons images of the target class only"):
            poison(gray(), CleanLabel(), "all-to-all")

    def test_a_rate_given_comes_before_that_of_the_attack(self):
        clean = gray()
        assert [int(changed(clean, poison(clean, Marked(), 3, rate)).sum()) for rate in (0, 0.05, 0.25)] == [0, 6, 30]

    def test_covers_count_against_the_images_there_are(self):
        with pytest.raises(DataError, match="needs 36 of 40 images, but only 30"):
            poison(gray(), Marked(), 3, rate=0.3)

    def test_covers_do_not_change_which_images_are_poisoned(self):
        clean = gray()
        few, many = poison(clean, PATCH, 3, 0.1, seed=4), poison(clean, Marked(), 3, 0.1, seed=4)
        assert torch.equal(few.labels, many.labels)

    @pytest.mark.parametrize("method", ["_poisoned", "_cover"])
    def test_what_an_author_makes_of_training_images_is_checked(self, method):
        broken = type("Broken", (Marked,), {method: lambda self, few, clean, rng: few.floats() + 2})
        with pytest.raises(DataError, match=r"images from marked in \[0, 1\]"):
            poison(gray(), broken(), 3)

    @pytest.mark.parametrize(
        ("attack", "poisoned", "covers", "labels"),
        [
            (AdaptiveBlend(), 1, 1, 1),
            (BadNets(), 40, 0, 40),
            (Blend(), 40, 0, 40),
            (BppAttack(), 40, 40, 40),
            (DFST(), 20, 0, 20),
            (FeatureCollision(epochs=1, iterations=2), 50, 0, 0),
            (FTrojan(), 40, 0, 40),
            (L0Inv(pixels=6), 80, 0, 80),
            (L2Inv(), 80, 0, 80),
            (LabelConsistent(epochs=1, iterations=2), 80, 0, 0),
            (LowFrequency(), 40, 0, 40),
            (SIG(), 100, 0, 0),
            (TrojanSquare(size=5, norm=4), 80, 0, 80),
            (TrojanWatermark(), 80, 0, 80),
            (WaNet(), 40, 80, 40),
        ],
        ids=lambda each: getattr(each, "name", None),
    )
    def test_the_published_numbers(self, attack, poisoned, covers, labels):
        pixels = torch.randint(0, 256, (400, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        clean = CleanSet(pixels, torch.arange(400) % 4)
        after = poison(clean, attack, target=2)
        hit = changed(clean, after)
        assert int(hit.sum()) == poisoned + covers
        assert int((after.labels != clean.labels).sum()) == labels
        assert (after.labels[after.labels != clean.labels] == 2).all()
        assert (clean.labels[hit] == 2).all() if attack.clean_label else (clean.labels[hit] != 2).all()
        assert poison(clean, attack, target=2).sha256 == after.sha256
        assert poison(clean, attack, target=2, seed=1).sha256 != after.sha256 or poisoned == 100


class TestTrain:
    def test_it_learns_and_gives_a_net_ready_to_use(self):
        images = two_kinds()
        trained = train(linear(), images, epochs=20, seed=0, batch_size=8)
        assert evaluate(trained, images).acc.value == 1
        assert not any(module.training for module in trained.modules())

    def test_augmented_and_smoothed_training_learns_too(self):
        images = two_kinds()
        seen = []

        def augment(batch, generator):
            seen.append(len(batch))
            return batch

        trained = train(linear(), images, 20, seed=0, batch_size=8, smoothing=0.2, augment=augment, bf16=True)
        assert evaluate(trained, images).acc.value == 1
        assert sum(seen) == 20 * len(images)
        assert all(parameter.dtype == torch.float32 for parameter in trained.parameters())
        plain = train(linear(), images, 20, seed=0, batch_size=8)
        sure = [net(images.floats()).softmax(1).max(1).values.mean() for net in (trained, plain)]
        assert sure[0] < sure[1], "smoothing keeps it from being sure"

    @pytest.mark.parametrize("native", [True, False])
    def test_it_rounds_to_bfloat16_only_where_that_is_asked_for_and_native(self, monkeypatch, native):
        monkeypatch.setattr("untrojan.speed.multiplies_bfloat16", lambda _: native)
        seen = []
        net = linear()
        net.register_forward_hook(lambda module, _, out: seen.append(out.dtype) if module.training else None)
        for asked in (True, False):
            train(net, two_kinds(), 1, seed=0, bf16=asked)
        assert seen == [torch.bfloat16 if native else torch.float32, torch.float32]

    def test_a_net_that_views_the_output_of_a_convolution_in_another_shape_trains_too(self):
        class Viewing(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.head = nn.Conv2d(2, 3, 2), nn.Linear(27, 2)

            def forward(self, images):
                return self.head(self.conv(images).view(-1, 27))

        net = Viewing()
        images = CleanSet(torch.rand(8, 2, 4, 4), torch.arange(8) % 2)
        for bf16 in (False, True):
            trained = train(net, images, 1, seed=0, bf16=bf16)
            assert not torch.equal(trained.conv.weight, net.conv.weight)

    def test_weights_of_convolutions_are_given_back_as_they_lay(self):
        net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.LazyLinear(2))
        images = CleanSet(torch.rand(8, 1, 4, 4), torch.arange(8) % 2)
        net(images.floats())
        trained = train(net, images, 1, seed=0)
        assert trained[0].weight.is_contiguous()
        assert not torch.equal(trained[0].weight, net[0].weight)

    def test_the_net_given_and_the_random_state_are_left_alone(self):
        net = linear().eval()
        net[1].bias.requires_grad_(False)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        state = torch.get_rng_state()
        train(net, two_kinds(), epochs=2, seed=7)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert [parameter.requires_grad for parameter in net.parameters()] == [True, False]
        assert not net.training

    def test_same_seed_same_net_also_with_dropout(self):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 2))
        first, second, other = (train(net, two_kinds(), epochs=2, seed=seed)[2].weight for seed in (3, 3, 4))
        assert torch.equal(first, second)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize(("count", "size"), [(9, 4), (21, 4), (13, 3), (7, 2), (3, 2), (2, 64), (65, 64)])
    def test_batch_norm_never_gets_a_single_image(self, count, size):
        net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 2))
        train(net, two_kinds(count), epochs=2, seed=0, batch_size=size)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_divergence_is_an_error_that_says_what_to_do(self):
        with pytest.raises(ModelError, match="lower --lr"):
            train(linear(), two_kinds(), epochs=50, seed=0, lr=1e30)

    def test_a_poisoned_net_is_backdoored_and_a_clean_one_is_not(self):
        training, test = digits().split(0.3, seed=0)
        torch.manual_seed(0)
        net = build("digits-cnn")
        for rate, low, high in ((0.1, 0.95, 1), (0, 0, 0.05)):
            scores = evaluate(train(net, poison(training, PATCH, 7, rate, 0), 8, seed=0), test, PATCH, 7)
            assert scores.acc.value >= 0.95
            assert low <= scores.asr.value <= high


def test_an_attack_is_no_text():
    with pytest.raises(ConfigError, match="expected a method of kind Attack, got 'badnets'"):
        poison(CleanSet(torch.rand(4, 1, 4, 4), torch.arange(4)), "badnets", 1)
