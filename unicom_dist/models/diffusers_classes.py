"""Classes of diffusers, imported when first needed (seconds)."""

import sys
from importlib import import_module
from typing import Any


def diffusers_class(name: str) -> Any:
    """`diffusers.<name>`.

    Workaround: a torchvision built for another torch fails on import and takes diffusers with it, which has no need of
    it here; it is hidden then. Remove when diffusers imports it only on use. What it fails with depends on where the
    two differ: an operator (RuntimeError), a library's symbol (ImportError, OSError), a Python name (AttributeError).
    """
    try:
        import_module("torchvision")
    except ModuleNotFoundError:
        pass
    except (ImportError, OSError, RuntimeError, AttributeError):
        for module in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    return getattr(import_module("diffusers"), name)
