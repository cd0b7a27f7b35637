import importlib
import inspect
import pkgutil

from scf_fast import kernels


def test_every_public_function_of_the_kernel_files_is_exported():
    """Except those of private files, of the expansion that the kernels share, and of the references."""
    public = set()
    for name in {module.name for module in pkgutil.iter_modules(kernels.__path__)} - {"debye", "reference"}:
        if name.startswith("_"):
            continue
        module = importlib.import_module(f"scf_fast.kernels.{name}")
        public |= {
            name
            for name, member in inspect.getmembers(module, inspect.isfunction)
            if member.__module__ == module.__name__ and not name.startswith("_")
        }
    assert public <= set(kernels.__all__) and len(public) > 10
    assert all(hasattr(kernels, name) for name in kernels.__all__) and len(set(kernels.__all__)) == len(kernels.__all__)
