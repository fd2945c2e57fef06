"""PGD on cross-entropy through our attack, beside the same loop in bare torch."""

from __future__ import annotations

from benchmarks.record import Figure, Result
from benchmarks.scene import Attacked, Scene, bare_loop
from benchmarks.timing import against
from robustknn import KNN
from robustknn.models import DigitsCNN, MnistCNN

BOUND = 1.10
WHAT = (
    "The 40 steps of PGD on the network's cross-entropy through our attack (GradientAttack._climb with the looks at "
    "the classifier stubbed out), in units of a bare torch loop that takes the same steps to the same examples. The "
    "hard decision before and after is timed by itself."
)
SETTINGS = {"classifier": "KNN, k = 5, L2, on relu3", "threat": "linf, eps 0.1", "references": 10_000}


def run(quick: bool) -> Result:
    """Measure on the MNIST network and on the small one for 8×8 digits."""
    repeats, steps, n = (2, 2, 100) if quick else (9, 40, 10_000)
    figures = []
    for title, network, size, batch in (("MNIST CNN", MnistCNN, 28, 100), ("digits CNN", DigitsCNN, 8, 500)):
        scene = Scene.make(network, size, 16 if quick else batch)
        classifier = KNN(scene.references(["relu3"], n), 5)
        ours, bare = Attacked(scene, classifier, None, steps), bare_loop(scene, steps)
        found = against(bare, {"steps": ours.steps, "searches": ours.searches}, repeats)
        what = f"{title}, batch {batch}"
        figures.append(Figure.of(f"{what}: {steps} steps", found["steps"], BOUND))
        figures.append(Figure.of(f"{what}: the two hard decisions", found["searches"]))
    return Result(WHAT, repeats, figures, {**SETTINGS, "steps": steps, "references": n})
