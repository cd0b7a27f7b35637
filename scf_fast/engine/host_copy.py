"""Values of a device that the host needs, copied while the device goes on."""

from typing import Any

import torch


class HostCopy:
    """A copy of a small tensor on the host, of the values that it has now.

    On a GPU only :meth:`tolist` waits, and for no more than what the device had to do when the copy was made.
    """

    def __init__(self, values: torch.Tensor):
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = values.clone()

    def tolist(self) -> Any:
        """Returns the values as :meth:`torch.Tensor.tolist` does, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
