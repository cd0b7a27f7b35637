"""The SCF loss kernels compiled for GPUs that need not be there: nothing spills."""

ARCHITECTURES = [80, 90, 100]


def test_no_kernel_spills_registers_or_uses_local_memory(compile_for_gpus):
    for usages in compile_for_gpus("scf_loss", [[architecture] for architecture in ARCHITECTURES]):
        assert len(usages) == 12 and all(usage["REG"] > 0 for usage in usages.values())
        assert not {name: usage for name, usage in usages.items() if usage["STACK"] or usage["LOCAL"]}
