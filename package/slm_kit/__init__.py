"""The kit as one package, for a fork's own folder: `from slm_kit import slm, train_slm`."""

# pip install -e FOLDER_OF_THE_KIT
#
# The kit's files import each other by short names (`import slm`, `from data import TokenSet`),
# which a fork wants for files of its own. So `slm_kit.NAME` is the checkout's file of that name,
# compiled with its imports of the kit's own files rewritten to slm_kit. Nothing is copied, and no
# short name is taken. Load the kit by one name in a process: slm_kit.slm and slm are two modules.

import ast
import importlib.abc
import importlib.machinery
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem for path in ROOT.glob("*.py")}
ROOMS = {path.parent.name for path in ROOT.glob("*/__init__.py")}

if "slm" not in FILES:
    raise ImportError(f"slm_kit: no slm.py in {ROOT}; install the checkout with pip install -e")


def is_ours(module):
    """Is this dotted name, such as data or training.heads, one of the kit's files?"""
    return module.split(".")[0] in FILES | ROOMS


class OneName(ast.NodeTransformer):
    """Rewrites imports of the kit's files to slm_kit's. Every statement keeps its line."""

    def visit_ImportFrom(self, node):  # from data import TokenSet
        if node.level == 0 and is_ours(node.module):
            node.module = f"{__name__}.{node.module}"
        return node

    def visit_Import(self, node):
        node.names = [new for old in node.names for new in self.renamed(old)]
        return node

    def renamed(self, alias):
        """`import slm` as `import slm_kit.slm as slm`.

        `import demo.chain` loads demo.chain but binds demo: two imports here.
        """
        if not is_ours(alias.name):
            return [alias]
        whole = f"{__name__}.{alias.name}"
        if alias.asname:
            return [ast.alias(whole, alias.asname)]
        room = alias.name.split(".")[0]
        bound = ast.alias(f"{__name__}.{room}", room)
        return [bound] if alias.name == room else [ast.alias(whole), bound]


class Loader(importlib.machinery.SourceFileLoader):
    """Reads a file of the kit under its name in slm_kit."""

    def source_to_code(self, data, path, **options):
        tree = OneName().visit(ast.parse(data, path))
        return super().source_to_code(ast.fix_missing_locations(tree), path, **options)

    def get_code(self, fullname):
        """Compiled anew each time: __pycache__ belongs to the files under their short names."""
        return self.source_to_code(self.get_data(self.path), self.path)


class Finder(importlib.abc.MetaPathFinder):
    """Finds slm_kit.NAME in the checkout."""

    def find_spec(self, fullname, path, target=None):
        if not fullname.startswith(f"{__name__}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and spec.has_location:
            spec.loader = Loader(fullname, spec.origin)
        return spec


__path__ = [str(ROOT)]
sys.meta_path.insert(0, Finder())
