"""The kernels are defined once a process: interpreted where there is no GPU to compile them for, whichever test imports them first."""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
