"""Old import names in a checkout: ``import kernels`` and ``python -m pipelines.index`` hand over to
``scf_fast.kernels`` and ``scf_fast.pipelines``.

The folders lie at the top of the checkout, so Python finds them under their short names too. Loading a file under both
names would register each operator twice, so the short name becomes the same module as the long one.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys

_HOME = "scf_fast"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers imports of ``NAME`` and ``NAME.x`` with the modules ``scf_fast.NAME`` and ``scf_fast.NAME.x``."""

    def __init__(self, name: str):
        self.name = name

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] != self.name:
            return None
        real = importlib.util.find_spec(f"{_HOME}.{fullname}")
        if real is None:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=real.origin)
        spec.submodule_search_locations = real.submodule_search_locations
        return spec

    def create_module(self, spec):
        module = importlib.import_module(f"{_HOME}.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state  # the import system has put the short name's in its place

    def get_code(self, fullname):
        """Code of ``python -m NAME.x``: runs the module under its long name."""
        program = f"import runpy; runpy.run_module({_HOME + '.' + fullname!r}, run_name='__main__', alter_sys=True)"
        return compile(program, fullname, "exec")


def hand_over(name: str) -> None:
    """Makes ``name`` and everything below it mean the modules of ``scf_fast.name`` from now on."""
    sys.meta_path.insert(0, _Finder(name))
    sys.modules[name] = importlib.import_module(f"{_HOME}.{name}")
