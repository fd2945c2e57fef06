"""You have an encoder, a faiss index and the labels of what it holds: attack the classifier they make.

No image of the catalogue is needed, and its vectors are not copied.

python examples/attack_a_faiss_index.py
"""

import faiss
import torch
from torch import nn

import robustknn as rk
from robustknn.classifiers import knn_from_index

# What you have: a torch encoder, an index of its embeddings, a label for each of them, and queries.
torch.manual_seed(0)
encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 64), nn.ReLU(), nn.Linear(64, 32))
images, labels = torch.rand(1100, 3, 16, 16), torch.arange(1100) % 5
images = 0.5 * images + 0.5 * torch.rand(5, 3, 16, 16)[labels]
index = faiss.IndexFlatIP(32)
index.add(nn.functional.normalize(encoder(images[100:])).detach().numpy())

# Ten lines.
classifier = knn_from_index(encoder, index, labels[100:], n_neighbors=5, metric="cosine")
x, y = images[:100], labels[:100]
print(f"clean: {float((classifier.predict(x) == y).double().mean()):.2f} of the queries are right")
for eps in (1 / 255, 4 / 255, 16 / 255):
    result = rk.PGD()(classifier, x, y, rk.ThreatModel("linf", eps))
    print(f"eps {eps:.4f}: {float(result.robust.double().mean()):.2f} stay right")
