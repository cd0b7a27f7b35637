"""Size and landmark positions of an aligned face: what all data sets are cropped to and all networks expect."""

import numpy as np

FACE_SIZE = 112  # pixels, height and width
# The five-point template of insightface's alignment (``arcface_dst`` in its face_align.py): left eye, right eye, nose
# tip, left and right mouth corner as (x, y) in pixels. Pixel centers have whole coordinates.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
