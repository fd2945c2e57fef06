"""The papers' tables and figures, each run by one command: `robustknn reproduce NAME`.

To add an experiment, write one file here (`advknn_table2.py` is a whole one), import it below, and put what the paper
printed into `published/NAME.toml`:

1. A subclass of `Experiment`, registered by name: `@experiments.register("paper-table2")`. Its class attributes say the
   paper, the table, what it shows, its data sets and its presets: plain options, read by `bench["key"]` and changed by
   `--set key=value`.
2. `parts(bench)` lists the work as `Part(key, seconds, run)`. It loads nothing. `seconds` is what is left of the part
   on two cores of a plain CPU. `run(folder)` gives small JSON; what it returned is sealed and never done again, unless
   settings, data or code change. Closures share objects through `bench` or an object of your own (see `Victim`).
3. A part of more than a few minutes must survive a kill inside. Networks: `bench.train(Recipe(…), seconds)` is a part,
   `bench.network(recipe)` the network. Samples: `by_block(folder, n, size, measure, …)`. Attacks on a classifier:
   `evaluate(…, out=folder)`. What several experiments need goes into `bench.shared("examples", __name__, **what)`;
   where it is not `by_block` that writes there, write within `with alone(folder):`.
4. `cells(bench, found)` turns the parts' rows into `Cell.share(row, column, right, n)` or `Cell.mean(…)`; the published
   number of the same row and column is shown beside it. Worst cases take `protocol=WORST` and, as row, the classifier.
5. `pictures(bench, found)` and `draw(record)` where there is a figure (`figures.py` has the pieces).

A part counts as long as its experiment's file, the `*_victim.py` modules that this imports from, and the library are as
they were when it was done.
`robustknn reproduce NAME --out docs/results/data` adds a seed to the record NAME.DATA.PRESET.json, and
`robustknn reproduce --pages docs/results` writes the pages; they are never written by hand.
"""

from robustknn.reproduce import (  # noqa: F401
    advknn_fig3,
    advknn_fig4,
    advknn_fig5,
    advknn_fig6,
    advknn_fig7,
    advknn_table1,
    advknn_table2,
    advknn_table3,
    ask_attack,
    ask_defense,
    ask_defense_published,
    ask_loss,
    ask_scale,
    daeknn_fig1,
    daeknn_fig3,
    daeknn_table1,
    daeknn_table2,
    dknn_tables,
    webscale_defenses,
    webscale_features,
    webscale_k,
    webscale_table1,
)
from robustknn.reproduce.bench import Bench, Settings
from robustknn.reproduce.blocks import alone, by_block
from robustknn.reproduce.experiment import PUBLISHED, WORST, Cell, Experiment, Front, Part, Presets, experiments
from robustknn.reproduce.networks import Recipe

__all__ = [
    "PUBLISHED",
    "WORST",
    "Bench",
    "Cell",
    "Experiment",
    "Front",
    "Part",
    "Presets",
    "Recipe",
    "Settings",
    "alone",
    "by_block",
    "experiments",
]
