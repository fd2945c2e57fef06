"""The victim of the AdvKNN tables, with attacks at other k, layers and radii, and Sitawarin & Wagner's beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from robustknn.recipes.sitawarin_wagner import sw1_published
from robustknn.reproduce.advknn_victim import STEP, Victim
from robustknn.reproduce.blocks import by_block, left
from robustknn.reproduce.experiment import Part
from robustknn.threat import ThreatModel

SITAWARIN = "Sitawarin & Wagner"
SW_RADIUS = 3.476
"""The mean L2 distance that arXiv 1911.06591 states for Sitawarin & Wagner's attack, its bound in their release."""
_SW_SECONDS = 5.0  # of a sample on two cores, a search of 1,000 steps at most
_MADE, _SEARCHED = 250, 25


class AblatedVictim(Victim):
    """Options besides the common ones: `few` samples, and `sw_n`, `sw_steps` for Sitawarin & Wagner."""

    def attacked(
        self,
        key: str,
        method: str,
        kind: str,
        *,
        k: int | None = None,
        layers: tuple[str, ...] | None = None,
        eps: float | None = None,
    ) -> Part:
        """A part of its own that attacks `few` samples and counts who stays right.

        The attack is made on the kNN, or with `layers` on the DkNN through the heads of these layers. The row: n, right
        without attack and under it, by "attacked" (what it was made on) and "knn"; the L2 distances.
        """
        n = min(self.bench["few"] or self.scored, self.scored)

        def run(folder: Path) -> dict[str, Any]:
            threat = self.threat if eps is None else self.threat.with_eps(eps)
            split = self.split.subset(self.some(n, "few"))

            def measure(rows: Tensor) -> Mapping[str, Tensor]:
                attack = self.attack(method, kind, k, layers)
                on = self.knn(k) if layers is None else self.dknn
                x, y, ids = split.batch(rows), split.labels[rows], split.ids[rows]
                found = attack(on, x, y, threat, sample_ids=ids, seed=self.bench.seed, batch_size=_MADE)
                decided = {
                    "attacked": found.labels,
                    "clean": found.clean_labels,
                    "knn": self.knn(k).predict(found.x_adv),
                }
                return {"l2": found.l2, **{name: labels.cpu() == y for name, labels in decided.items()}}

            rows = by_block(folder, len(split), _MADE, measure, self.bench.progress, key)
            right = {name: int(rows[name].sum()) for name in ("attacked", "knn")}
            clean = {"attacked": int(rows["clean"].sum())}
            return {
                "n": len(rows["l2"]),
                "clean": clean,
                "right": right,
                "l2": [round(v, 4) for v in rows["l2"].tolist()],
            }

        each = (
            STEP * (1 if kind == "FGSM" else self.bench["steps"])
            + (0.2 if layers is None else 2.5) * self.search_seconds
        )
        return Part(key, n * each + self.heads_seconds(method, k, layers), run)

    def sitawarin(self) -> dict[str, Tensor]:
        """Sitawarin & Wagner's first attack as they ran it on DkNN, on `sw_n` samples: x, label, dknn, clean (the
        decision without attack), credibility, l2.

        Up to L2 3.476 a perturbation costs nothing, beyond it much; so no ball holds the example.
        """
        split = self.split.subset(self.some(self.bench["sw_n"], SITAWARIN))
        settings: dict[str, Any] = {"n_guides": 500, "slack": SW_RADIUS, "c0": 0.01, "search_steps": 1}
        attack = sw1_published(steps=self.bench["sw_steps"], **settings)

        def measure(rows: Tensor) -> Mapping[str, Tensor]:
            x, y = split.batch(rows), split.labels[rows]
            threat = ThreatModel("l2", ThreatModel("l2", 1.0).diameter(x))
            found = attack(self.dknn, x, y, threat, sample_ids=split.ids[rows], seed=self.bench.seed)
            alpha = self.dknn.nonconformity(found.x_adv)
            credibility = self.dknn._p_values(alpha).amax(1)
            decided = {"dknn": found.labels, "clean": found.clean_labels}
            return {"x": found.x_adv, "label": y, **decided, "credibility": credibility, "l2": found.l2}

        folder, what = self._sitawarin_folder(), SITAWARIN
        return by_block(folder, len(split), _SEARCHED, measure, self.bench.progress, what)

    def _sitawarin_folder(self) -> Path:
        return self.bench.shared("sitawarin", __name__, **self.described("k", "sw_n", "sw_steps"))

    def sitawarin_part(self) -> Part:
        """The part that runs it."""
        n = min(self.bench["sw_n"], self.scored)
        seconds = n * _SW_SECONDS * self.bench["sw_steps"] / 1000 * left(self._sitawarin_folder(), n, _SEARCHED)

        def run(_: Path) -> dict[str, Any]:
            found = self.sitawarin()
            right = found["dknn"] == found["label"]
            fooled = found["l2"][~right & (found["clean"] == found["label"])]
            return {"n": len(right), "right": int(right.sum()), "fooled_l2": [round(v, 4) for v in fooled.tolist()]}

        return Part(SITAWARIN, seconds, run)
