"""What may be done with a layer's values before they are compared: PCA, R-MAC, signs, and these in a row."""

from robustknn.transforms.base import Chain, Transform, load_transform
from robustknn.transforms.projection import Projection
from robustknn.transforms.rmac import RegionalMax, regional_maxima, regions
from robustknn.transforms.signs import Signs

__all__ = [
    "Chain",
    "Projection",
    "RegionalMax",
    "Signs",
    "Transform",
    "load_transform",
    "regional_maxima",
    "regions",
]
