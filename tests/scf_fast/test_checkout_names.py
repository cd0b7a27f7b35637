"""``kernels`` and ``pipelines``, the short names in a checkout, are the modules of ``scf_fast``, loaded once."""

import sys

import pytest

PROGRAM = """
import importlib, sys
{imports}
files = {{}}
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in ("kernels", "pipelines"):
        assert module is sys.modules["scf_fast." + name], name
    elif name.startswith("scf_fast") and getattr(module, "__file__", None):
        assert files.setdefault(module.__file__, name) == name, (name, files[module.__file__])
assert {{"kernels.log_bessel", "pipelines.sources.tar"}} <= set(sys.modules)
assert "scf_fast.pipelines.sources.tar" in files.values()
assert importlib.util.find_spec("pipelines.no_such_module") is None
"""
SHORT = "import kernels.log_bessel; from pipelines.sources import tar; import pipelines.sources.tar"
LONG = "import scf_fast.kernels.log_bessel; import scf_fast.pipelines.sources.tar"


@pytest.mark.parametrize("imports", [f"{SHORT}\n{LONG}", f"{LONG}\n{SHORT}"], ids=["short_first", "long_first"])
def test_no_module_is_loaded_under_two_names(run_command, imports):
    status, output = run_command([sys.executable, "-c", PROGRAM.format(imports=imports)])
    assert status == 0, output


@pytest.mark.parametrize("command", ["index", "convert", "synthetic"])
def test_commands_run_under_their_short_names(run_command, command):
    status, output = run_command([sys.executable, "-m", f"pipelines.{command}", "--help"])
    assert status == 0 and f"usage: python -m scf_fast.pipelines.{command} " in output, output
