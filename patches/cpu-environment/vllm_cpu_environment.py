"""Import hook: vLLM starts where torchvision, torchaudio and torchcodec are built for CUDA only.

A `.pth` file imports this module at interpreter start, so that it is there in every process;
nothing but this small finder happens then. Each loader below acts when the compiled library
of its package failed to load, and never on a package whose library loads.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

SYMPTOM = "operator torchvision::nms does not exist"
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_libraries: list[object] = []  # a torch.library.Library takes its operators with it when it dies


def define_schemas() -> None:
    """Defines, without any kernel, the two operators that torchvision gives a fake kernel."""
    import torch.library

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + SCHEMA)
    _libraries.append(library)


class TorchvisionLoader(SourceFileLoader):
    """Runs torchvision, and once more with the missing schemas defined if they were missing."""

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except RuntimeError as error:
            if SYMPTOM not in str(error):
                raise
            define_schemas()
            super().exec_module(module)


class TorchaudioLoader(SourceFileLoader):
    """A library that does not load counts as not installed, which torchaudio handles itself."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        load = getattr(module, "_load_lib", None)
        if load is None:
            return

        def load_or_skip(lib: str) -> bool:
            try:
                return bool(load(lib))
            except OSError:
                return False

        module.__dict__["_load_lib"] = load_or_skip


class TorchcodecLoader(SourceFileLoader):
    """A library that does not load is an import error, which users of torchcodec expect."""

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except OSError as error:
            raise ImportError(str(error), name=module.__name__) from error


LOADERS = {
    "torchvision": TorchvisionLoader,
    "torchaudio._extension.utils": TorchaudioLoader,
    "torchcodec": TorchcodecLoader,
}


class Finder(MetaPathFinder):
    """Finds what the path holds under the names above, with the loader given there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        loader = LOADERS.get(fullname)
        if loader is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return None
        spec.loader = loader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, Finder())
