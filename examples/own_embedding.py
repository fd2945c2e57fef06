"""You have an encoder and labelled embeddings: attack the classifier they make.

python examples/own_embedding.py
"""

import torch
from torch import nn

import robustknn as rk

# What you have: an encoder that returns embeddings, the embeddings of your catalogue, and their labels.
torch.manual_seed(0)
encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 64), nn.ReLU(), nn.Linear(64, 32))
images, labels = torch.rand(500, 3, 16, 16), torch.arange(500) % 5
images += 0.15 * torch.rand(5, 3, 16, 16)[labels]
images = images.clamp(0, 1)
embeddings = encoder(images).detach()

# Ten lines.
features = rk.FeatureExtractor(encoder)  # layers=None: the encoder's own output
references = rk.ReferenceSet.from_vectors(embeddings[100:], labels[100:], features=features)
classifier = rk.KNN(references, n_neighbors=5, metric="cosine")
x, y = images[:100], labels[:100]
for eps in (1 / 255, 4 / 255, 16 / 255):
    result = rk.PGD()(classifier, x, y, rk.ThreatModel("linf", eps))
    print(f"eps {eps:.4f}: {float(result.robust.double().mean()):.2f} of the queries stay right")
