"""What an installed library has and how it can be called, asked by name and signature and never by version number.
Nothing is run.

For libraries without a stable interface: AITER moves modules, adds parameters and drops names between builds
(reference: aiter #2870, #36867 of SGLang). Every answer is a list of sentences, empty when all is well.
"""

import importlib
import inspect


def part(*names):
    """The first of these modules that can be imported.

    Returns (module, []) or (None, [sentence]). Any exception counts: a part that fails must not take the rest of its
    library away.
    """
    errors = []
    for name in names:
        try:
            return importlib.import_module(name), []
        except (
            Exception
        ) as error:  # not only ImportError: AITER raises RuntimeError and KeyError while its modules are imported
            errors.append(f"{name}: {type(error).__name__}: {str(error).strip() or 'no message'}")
    return None, [f"This build lacks a part that is needed ({'; '.join(errors)})."]


def lacks(module, label, *names):
    """A sentence per name that `module` does not have."""
    return [f"This build of {label} has no {name}." for name in names if not hasattr(module, name)]


def takes(function, name):
    """True when the function has a parameter of this name."""
    return function is not None and name in inspect.signature(function).parameters


def unbindable(function, label, *args, **kwargs):
    """A sentence when function(*args, **kwargs) would be a TypeError: an argument it does not know, or one that it
    needs and does not get.
    """
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        return [f"This build's {label} cannot be called the way it is here: {error}."]
    return []
