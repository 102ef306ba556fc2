"""The merging methods, one file per idea; importing a file registers its methods with `plait.merging.registry`."""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
