def launch_pair_likelihood(*arguments: object) -> None:
    raise NotImplementedError('pair_likelihood_loss has no Triton kernel yet: pass backend="torch"')
