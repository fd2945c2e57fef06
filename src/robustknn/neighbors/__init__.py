"""Neighbor indexes behind one protocol."""

from robustknn.neighbors.base import MISSING, ClassNeighbors, Metric, NeighborIndex, Neighbors
from robustknn.neighbors.exact import ExactIndex
from robustknn.neighbors.faiss_index import FaissIndex
from robustknn.neighbors.milvus_index import MilvusIndex

__all__ = [
    "MISSING",
    "ClassNeighbors",
    "ExactIndex",
    "FaissIndex",
    "Metric",
    "MilvusIndex",
    "NeighborIndex",
    "Neighbors",
]
