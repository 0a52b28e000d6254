"""Synthetic streets: the data set that comes with the project.

Street scenes with CamVid's 11 classes, of which the default data label the 6 large ones, drawn from (seed, index)
alone, the same bytes on every x86-64 CPU. Classes share colours and textures on purpose, so that shape and place decide
what a thing is: posters of people are wall, road and pavement may be one grey, awnings look like shop signs.
"""

from segdistill.streets._scene import CLASSES, IGNORE_INDEX, scene
from segdistill.streets._write import DEFAULT_SAMPLES, FIRST_INDEX, write

__all__ = ["CLASSES", "DEFAULT_SAMPLES", "FIRST_INDEX", "IGNORE_INDEX", "scene", "write"]
