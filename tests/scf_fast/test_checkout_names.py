"""Short names in a checkout. In processes of their own: the names stay for the rest of a process."""

import sys
import textwrap

import pytest

ONE_NAME_PER_MODULE = """
import pathlib, sys

def check_names():
    modules = {name: module for name, module in sys.modules.items() if getattr(module, "__file__", None)}
    short = [name for name in modules if name.partition(".")[0] in ("kernels", "pipelines")]
    for name in short:
        assert modules[name] is modules["scf_fast." + name], name
        assert modules[name].__name__ == modules[name].__spec__.name == "scf_fast." + name, name
    by_file = {}
    for name, module in modules.items():
        file = pathlib.Path(module.__file__).resolve()
        assert by_file.setdefault(file, module) is module or "site-packages" in str(file), (name, file)
    return short
"""


@pytest.fixture
def run_program(run_command):
    def run(program):
        program = ONE_NAME_PER_MODULE + textwrap.dedent(program)
        status, output = run_command([sys.executable, "-W", "error::RuntimeWarning", "-c", program])
        assert status == 0, output

    return run


@pytest.mark.parametrize(
    "first", ["import kernels, kernels.debye", "import scf_fast.kernels.debye", "import pipelines"]
)
def test_no_module_is_loaded_under_two_names(run_program, first):
    run_program(
        f"""
        {first}
        import kernels, kernels.debye
        import scf_fast.kernels.debye
        from kernels import scf_loss
        import kernels.scf_loss, kernels.reference
        import pipelines.sampling.sampler
        import scf_fast.kernels.reference, scf_fast.pipelines.sampling.sampler

        assert callable(scf_loss) and kernels.scf_loss is scf_loss is scf_fast.kernels.scf_loss
        assert kernels is scf_fast.kernels and kernels.debye is scf_fast.kernels.debye
        assert {{"kernels.debye", "kernels.reference", "pipelines.sampling.sampler"}} <= set(check_names())
        """
    )


def test_reload_and_names_of_missing_modules(run_program):
    run_program(
        """
        import importlib, importlib.util, pickle
        import kernels, kernels.reference, pipelines

        for module in (pipelines, kernels.reference):
            assert importlib.reload(module) is module
        assert pickle.dumps(kernels.SCFTerms).count(b"scf_fast.kernels.scf_loss") == 1
        assert importlib.util.find_spec("kernels.nothing") is None
        for name in ("kernels.nothing", "kernels.nothing.below", "pipelines.sampling.nothing"):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                assert name.startswith(error.name) and "scf_fast" not in str(error), error
            else:
                raise AssertionError(name)
        check_names()
        """
    )


@pytest.mark.parametrize("command", ["pipelines.index", "pipelines.synthetic", "scf_fast.pipelines.index"])
def test_commands_run_under_both_names(run_command, command):
    status, output = run_command([sys.executable, "-W", "error::RuntimeWarning", "-m", command, "--help"])
    assert status == 0 and output.startswith("usage:"), output
