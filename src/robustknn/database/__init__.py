"""Databases of references on the disk: built block by block, by one process or many, and searched where they lie."""

from robustknn.database.build import build_database
from robustknn.database.database import Database
from robustknn.database.extract import Executor, extract, extract_block, pieces
from robustknn.database.indexes import IndexRecord
from robustknn.database.layout import Block, Settings, is_database
from robustknn.database.local import local_executor
from robustknn.database.sampling import fit_projection, spread

__all__ = [
    "Block",
    "Database",
    "Executor",
    "IndexRecord",
    "Settings",
    "build_database",
    "extract",
    "extract_block",
    "fit_projection",
    "is_database",
    "local_executor",
    "pieces",
    "spread",
]
