"""The plain PyTorch of ``eager`` through torch.compile, which shows what fusion by the compiler alone achieves."""

import torch

from bench.baselines.eager import eager_log_bessel_i, eager_log_vmf_normalizer, eager_scf_loss

# Each size is compiled for itself, as in a training run with one batch size. Past the compiler's limit of
# recompilations (torch.compiler.reset() resets it), fullgraph raises an error where otherwise plain eager code would be
# timed under this name.
compiled_log_bessel_i = torch.compile(eager_log_bessel_i, dynamic=False, fullgraph=True)
compiled_log_vmf_normalizer = torch.compile(eager_log_vmf_normalizer, dynamic=False, fullgraph=True)
compiled_scf_loss = torch.compile(eager_scf_loss, dynamic=False, fullgraph=True)
