"""Short import names in a checkout: ``import kernels`` and ``python -m pipelines.index`` hand over to
``scf_fast.kernels`` and ``scf_fast.pipelines``.

The folders lie at the top of the checkout, so Python finds them under their short names too. Loading a file under both
names would register each operator twice, so the short name becomes another name of the same module.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType

_HOME = "scf_fast"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers imports of ``NAME`` and ``NAME.x`` with the modules ``scf_fast.NAME`` and ``scf_fast.NAME.x``."""

    def __init__(self, name: str):
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != self.name:
            return None
        try:
            real = importlib.util.find_spec(f"{_HOME}.{fullname}")
        except ModuleNotFoundError as error:
            if not f"{_HOME}.{fullname}".startswith(f"{error.name}."):
                raise  # not a parent package that is missing, but something that one of them imports
            return None
        if real is None:
            return None  # no other finder has it: Python names the short name in its error
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=real.origin)
        spec.submodule_search_locations = real.submodule_search_locations
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{_HOME}.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The module has run under its long name. The import system has put the short name's spec in place of its own,
        # by which importlib.reload and pickle would know it.
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state

    def get_code(self, fullname: str) -> CodeType:
        """Returns the code of ``python -m NAME.x``, which runs the module under its long name."""
        program = f"import runpy; runpy.run_module({_HOME + '.' + fullname!r}, run_name='__main__', alter_sys=True)"
        return compile(program, fullname, "exec")


def hand_over(name: str) -> None:
    """Makes ``name`` and everything below it mean the modules of ``scf_fast.name`` from now on."""
    importlib.import_module(f"{_HOME}.{name}")
    # What is loaded already needs no import under its short name. One would also set the package's attribute of that
    # name to the module, where ``scf_fast.kernels.scf_loss``, for example, is a function.
    for long_name, module in list(sys.modules.items()):
        if long_name == f"{_HOME}.{name}" or long_name.startswith(f"{_HOME}.{name}."):
            sys.modules[long_name.removeprefix(f"{_HOME}.")] = module
    if not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name))
