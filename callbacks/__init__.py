"""The compression stages, one file for each method. A ``Stage`` subclass in a new file here needs no registration."""

if __name__ == "callbacks":
    raise ImportError("import pqqp_lightning.callbacks, not callbacks: it would make every class a second time")

from importlib import import_module
from pkgutil import iter_modules

from pqqp_lightning.stages import Stage

# Export the stages that each file defines, but not those that it imports from elsewhere.
for _module in iter_modules(__path__):
    for _name, _value in vars(import_module(f"{__name__}.{_module.name}")).items():
        if isinstance(_value, type) and issubclass(_value, Stage) and _value.__module__ == f"{__name__}.{_module.name}":
            globals()[_name] = _value
