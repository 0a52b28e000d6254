"""The container images of the components, fixed when the pipeline is compiled.

KFP's cache knows an image only by its name. A name whose content changes would give yesterday's results for today's
code, so a name without a version is refused here.
"""

import os

from segdistill.errors import UserError


def fixed(variable: str, default: str) -> str:
    """The image that the environment names.

    Raises:
        UserError: it has no tag, or one that moves.
    """
    image = os.environ.get(variable) or default
    tag = image.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        raise UserError(
            f"{variable}: '{image}' does not say which version; give it a tag other than latest, or a digest"
        )
    return image


NOWHERE = "example.invalid"  # a registry that there is not, by RFC 2606
DATA = fixed("SEGDISTILL_IMAGE_DATA", f"{NOWHERE}/segdistill-data-python:0.1.0")
TRAIN = fixed("SEGDISTILL_IMAGE_TRAIN", f"{NOWHERE}/segdistill-train-python:0.1.0")
