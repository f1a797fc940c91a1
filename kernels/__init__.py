"""Triton kernels, installed and imported as ``pyquant.kernels``.

This folder has the name of a package on PyPI which transformers imports. Python started in the repository root finds
the folder first, and then this file is executed as ``kernels``. It steps aside: it looks for the other package on the
rest of the path and lets that one take its place. Where there is none it stays behind as an empty module, whose
version says that it is of no use; it must not raise, because transformers asks for the version of whatever is there.
"""

if __name__ == "kernels":

    def _step_aside() -> None:
        import sys
        from importlib.machinery import PathFinder
        from importlib.util import module_from_spec
        from pathlib import Path

        here = Path(__file__).resolve().parent.parent
        elsewhere = [entry for entry in sys.path if Path(entry).resolve() != here]
        spec = PathFinder.find_spec("kernels", elsewhere)
        if spec is None or spec.loader is None:
            globals()["__version__"] = "0"
            globals()["__path__"] = []  # `import kernels.linear` must not work under the wrong name either
        else:
            theirs = sys.modules["kernels"] = module_from_spec(spec)
            spec.loader.exec_module(theirs)

    _step_aside()
