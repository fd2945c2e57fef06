"""Neighbor indexes behind one protocol."""

from robustknn.neighbors.auto import AutoIndex, choose
from robustknn.neighbors.base import MISSING, Choice, ClassNeighbors, Metric, NeighborIndex, Neighbors
from robustknn.neighbors.exact import ExactIndex
from robustknn.neighbors.faiss_index import FaissIndex
from robustknn.neighbors.faiss_kinds import HNSWIndex, IVFFlatIndex, IVFPQIndex, IVFSQ8Index
from robustknn.neighbors.loading import load_index, make_index
from robustknn.neighbors.milvus_index import MilvusIndex
from robustknn.neighbors.on_disk import IVFFlatDiskIndex, IVFSQ8DiskIndex

__all__ = [
    "MISSING",
    "AutoIndex",
    "Choice",
    "ClassNeighbors",
    "ExactIndex",
    "FaissIndex",
    "HNSWIndex",
    "IVFFlatDiskIndex",
    "IVFFlatIndex",
    "IVFPQIndex",
    "IVFSQ8DiskIndex",
    "IVFSQ8Index",
    "Metric",
    "MilvusIndex",
    "NeighborIndex",
    "Neighbors",
    "choose",
    "load_index",
    "make_index",
]
