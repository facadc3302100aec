"""The pictures that a request brings: read and checked against the model, then put at the size of the job.

What they mean:

    image            where to start from (img2img); with a mask what is kept; for FLUX.1 Kontext what to change
    mask             white is repainted, black is kept
    outpaint         room around the picture, which is repainted
    control          pictures that say where things are: of ControlNets, or of FLUX.1 Canny and Depth
    image_prompt     pictures that say what to draw (FLUX.1 Redux)

Everything here is PIL's, and nothing needs torch.
"""

from flux_engine.inputs.control import Control
from flux_engine.inputs.fields import Brought, Inputs, PictureFields

__all__ = ["Brought", "Control", "Inputs", "PictureFields"]
