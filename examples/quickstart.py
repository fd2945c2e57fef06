"""From a network to the answer, in Python: how robust is this nearest-neighbor classifier?

python examples/quickstart.py
"""

import robustknn as rk
from robustknn.datasets import load
from robustknn.models import DigitsCNN
from robustknn.training import TrainConfig, initialise, train

source = load("digits", protocol="published")  # handwritten digits, 1,297 to train, 500 to test
model = initialise(DigitsCNN, seed=0)
train(model, source, TrainConfig(epochs=8, batch_size=64, lr=2e-3))

features = rk.FeatureExtractor(model, layers=["relu2", "relu3"])  # hooks: the model is not changed
references = rk.ReferenceSet.build(features, source.train)
classifier = rk.DkNN(references, n_neighbors=15).calibrate(source.calibration)

x, y = source.test.batch(range(100, 200)), source.test.labels[100:200]
print("accuracy", classifier.score(x, y), "mean credibility", float(classifier.credibility(x).mean()))

threat = rk.ThreatModel("linf", eps=0.15)
attack = rk.PGD(objective=rk.ASK(), steps=40)
result = attack(classifier, x, y, threat)
print("robust accuracy", float(result.robust.double().mean()), "mean L2", float(result.l2.mean()))
