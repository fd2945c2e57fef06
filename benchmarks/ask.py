"""How ASK is measured, for any metric and form."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.record import Figure, Result
from benchmarks.scene import Attacked, Scene, bare_loop
from benchmarks.timing import against
from robustknn import DkNN
from robustknn.models import MnistCNN
from robustknn.objectives import ASK

LAYERS = {2: ("relu2", "relu3"), 4: MnistCNN.feature_layers}
WHAT = (
    "The steps of PGD on ASK (GradientAttack._climb with the looks at the classifier stubbed out, guides looked up "
    "once) on the MNIST CNN, batch 100, in units of a bare torch loop of as many steps on cross-entropy. The searches "
    "(look at the inputs, gather the guides, look at the examples found) are timed by themselves, in the same unit."
)


def measure(metric: str, forms: Mapping[str, ASK], bounds: Mapping[int, float], quick: bool) -> Result:
    """Time every form with guides of so many layers as the bounds are given for."""
    repeats, steps, n = (1, 2, 200) if quick else (7, 10, 10_000)
    scene = Scene.make(MnistCNN, 28, 16 if quick else 100)
    figures = []
    for count, bound in bounds.items():
        layers = LAYERS[count]
        classifier = DkNN(scene.references(layers, n), 5 if quick else 75, metric=metric)
        attacked = {form: Attacked(scene, classifier, ask, steps) for form, ask in forms.items()}
        found = against(bare_loop(scene, steps), {form: a.steps for form, a in attacked.items()}, repeats)
        figures += [Figure.of(f"{', '.join(layers)}: {form}", ratio, bound) for form, ratio in found.items()]
        last = list(attacked)[-1]
        searched = against(bare_loop(scene, steps), {last: attacked[last].searches}, min(repeats, 3))
        figures.append(Figure.of(f"{', '.join(layers)}: the searches of one attack ({last})", searched[last]))
    return Result(WHAT, repeats, figures, {"steps": steps, "batch": len(scene.x), "references": n, "metric": metric})
