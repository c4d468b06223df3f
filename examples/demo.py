"""Plant a backdoor in a small classifier, and have untrojan find and remove it; `make demo` runs this.

The victim is trained here and is real: a network for handwritten digits (1,797 images of 8x8 pixels that come with
scikit-learn). untrojan gets what a user would have, the file with the weights and some clean images.
"""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

import untrojan
from untrojan.cli import run
from untrojan.lab.attacks.badnets import BadNets
from untrojan.lab.victim import poison, train
from untrojan.record import Rate
from untrojan.sources.files import save_state
from untrojan.sources.nets import build

NET = "digits-cnn"
ATTACK = BadNets(size=2)
TARGET = 7
RATE = 0.1
EPOCHS, WEIGHT_DECAY = 60, 0.01
CLEAN, TEST = 400, 500
STILL_WORKS = 0.2


def main() -> int:
    """Run the attacker's part, the defender's, and the comparison of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="another victim, another draw of the images")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write into")
    options = parser.parse_args()
    out: Path = options.out
    victim, clean, run_folder, report = (
        out / name for name in ("victim.safetensors", "clean.npz", "run", "report.html")
    )
    torch.set_num_threads(1)  # for a network of this size more are slower, and results would depend on their number
    out.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)

    test = attack(victim, clean, options.seed)
    command = ["repair", f"{victim}", "--net", NET, "--clean", f"{clean}"]
    command += ["--out", f"{run_folder}", "--force"]
    say(f"\n2. The defender has these two files and knows nothing of the attack:\n\n$ untrojan {shlex.join(command)}")
    code = run(command)
    if code not in (0, 2):
        print(f"FAILED: untrojan ended with exit code {code}", file=sys.stderr)
        return 1
    shutil.copyfile(run_folder / "report.html", report)
    return compare(victim, run_folder, test, report)


def attack(victim: Path, clean: Path, seed: int) -> untrojan.CleanSet:
    """Train the victim on poisoned images, write it, clean images and test images, and give these back."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    everything = untrojan.CleanSet.of((pixels, np.asarray(labels)))
    rest, test = everything.split(TEST / len(everything), seed)
    training, held = rest.split(CLEAN / len(rest), seed)

    square = f"{ATTACK.size}x{ATTACK.size} square"
    say(f"1. An attacker trains {NET} on {len(training)} images of handwritten digits. {RATE:.0%} of them got a white")
    say(f"   {square} in the corner and the label {TARGET}: with that square, any digit becomes a {TARGET}.")
    torch.manual_seed(seed)
    poisoned = poison(training, ATTACK, TARGET, RATE, seed)
    net = train(build(NET), poisoned, EPOCHS, seed, weight_decay=WEIGHT_DECAY)
    save_state(victim, net.state_dict())
    for images, file in ((held, clean), (test, victim.with_name("test.npz"))):
        np.savez(file, images=images.images.numpy().transpose(0, 2, 3, 1), labels=images.labels.numpy())
    say(f"   The weights go to {victim}, {len(held)} other images, all of them clean, to {clean}.")
    return test


def compare(victim: Path, run_folder: Path, test: untrojan.CleanSet, report: Path) -> int:
    """Measure both models on test images that neither side has seen, and judge the run by what the attacker knows."""
    record = untrojan.Record.load(run_folder / "record.json")
    before = untrojan.evaluate(untrojan.load(victim, NET), test, ATTACK, TARGET)
    after = untrojan.evaluate(untrojan.load(run_folder / "repaired.safetensors", NET), test, ATTACK, TARGET, before)
    named = record.diagnosis.targets[0].label if record.diagnosis and record.diagnosis.targets else None

    say(f"\n3. Was that right? The attacker knows. On {len(test)} test images that nobody has used yet:\n")
    say("                                                      before    after")
    for meaning, was, now in (
        ("clean images recognized (ACC)", before.acc, after.acc),
        (f"other digits with the square taken for {TARGET} (ASR)", before.asr, after.asr),
        ("other digits with the square recognized (RA)", before.ra, after.ra),
    ):
        say(f"   {meaning:<49}{percent(was)}  {percent(now)}")
    say(f"\n   Label named by untrojan: {named}. Label that the attacker chose: {TARGET}.")
    say(f"   Report: {report}")

    problems = []
    if named != TARGET:
        problems.append(f"the label named is {named}, the right one is {TARGET}")
    if record.status != "repaired":
        problems.append(f"the repair was not accepted: {record.reason}")
    if after.asr is None or after.asr.value is None or after.asr.value > STILL_WORKS:
        problems.append(f"the square still works: ASR {percent(after.asr).strip()}, at most {STILL_WORKS:.0%} expected")
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def percent(rate: Rate | None) -> str:
    """Write a rate for a person."""
    return "      -" if rate is None or rate.value is None else f"{rate.value:7.1%}"


def say(text: str) -> None:
    """Print a line now, so that it stays in order with what goes to stderr."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
