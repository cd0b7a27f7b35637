"""The plain PyTorch of `eager`, put through torch.compile: what fusion by the compiler alone gives."""

import torch

from bench.baselines.eager import eager_log_bessel_i, eager_log_vmf_normalizer, eager_scf_loss

# Each size is compiled for itself, as in a training run with one batch size. fullgraph: past the compiler's limit of
# recompilations (torch.compiler.reset() starts it anew) it raises, where it would else time plain eager code under this
# name.
compiled_log_bessel_i = torch.compile(eager_log_bessel_i, dynamic=False, fullgraph=True)
compiled_log_vmf_normalizer = torch.compile(eager_log_vmf_normalizer, dynamic=False, fullgraph=True)
compiled_scf_loss = torch.compile(eager_scf_loss, dynamic=False, fullgraph=True)
