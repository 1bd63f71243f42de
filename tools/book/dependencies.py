"""Which code of the package a chapter's results depend on, name by name.

Nearly every chapter imports nearly every module, directly or not, but uses a few functions
of each. So what counts is a module's top-level definitions: a piece of code depends on those
that it names, and on those that they name.
"""

import ast

import nbformat
from notebooks import without_magics

REST = "(the rest)"
"""A module's statements that define no name: they run whenever the module is imported."""

ALL = "*"
"""Every name of a module: it is passed on as a whole, or it has no such name."""


class Module:
    """A parsed module: the text of each name that it defines, and what each one uses.

    `texts` is {name: source}, `uses` is {name: {(module, name), …}}.
    """

    def __init__(self, name, code, exports):
        tree, lines = ast.parse(code), code.splitlines()
        self.name, self.imported = name, _imported(tree, exports)
        self.texts, nodes = {}, {}
        for node in tree.body:
            for defined in _defined(node):
                first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
                text = "\n".join(lines[first - 1 : node.end_lineno])
                self.texts[defined] = self.texts.get(defined, "") + text + "\n"
                nodes.setdefault(defined, []).append(node)
        self.uses = {name: self._used(found) for name, found in nodes.items()}

    def _used(self, nodes):
        """Return the (module, name) that nodes refer to."""
        found, through = set(), set()
        for node in (inner for outer in nodes for inner in ast.walk(outer)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, name = self.imported.get(node.value.id, (None, None))
                if module and name is None:
                    found.add((module, node.attr))
                    through.add(node.value)
            elif isinstance(node, ast.Name) and node not in through:
                if node.id in self.imported:
                    module, name = self.imported[node.id]
                    found.add((module, name or ALL))
                elif node.id in self.texts:
                    found.add((self.name, node.id))
        return found


def _defined(node):
    """Return the names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        return names or [REST]
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gcvit":
        return []
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return []
    return [REST]


def _imported(tree, exports):
    """Return {local name: (module, name)} of what comes from the package; no name: the module."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(
            a.name.split(".")[0] == "gcvit" for a in node.names
        ):
            raise ValueError(f"line {node.lineno}: write `from gcvit import …`, which is followed")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gcvit":
            for alias in node.names:
                local = alias.asname or alias.name
                if "." in node.module:
                    found[local] = (node.module.partition(".")[2], alias.name)
                else:
                    found[local] = exports.get(alias.name, (alias.name, None))
    return found


def package_modules(folder):
    """Return the package's modules by name, and its exports, {name: (module, name)}."""
    codes = {}
    for path in folder.rglob("*.py"):
        name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        codes[name] = path.read_text(encoding="utf-8")
    exports = _imported(ast.parse(codes.pop("__init__")), {})
    return {name: Module(name, code, exports) for name, code in codes.items()}, exports


def dependencies(code, modules, exports):
    """Return {(module, name): source} of all that a piece of code depends on."""
    chapter = Module("(chapter)", code, exports)
    queue = [use for uses in chapter.uses.values() for use in uses]
    queue += [(module, name or ALL) for module, name in chapter.imported.values() if name]
    found, seen = {}, set()
    while queue:
        use = queue.pop()
        if use in seen or use[0] not in modules:
            continue
        seen.add(use)
        module = modules[use[0]]
        if use[1] not in module.texts:  # what a package's __init__ passes on
            passed_on = module.imported.get(use[1])
            every = [passed_on] if passed_on else module.imported.values()
            queue += [(name, inner or ALL) for name, inner in every]
            if passed_on:
                continue
        names = [use[1]] if use[1] in module.texts else list(module.texts)
        for name in {*names, *({REST} & set(module.texts))}:
            if (module.name, name) not in found:
                found[module.name, name] = module.texts[name]
                queue += module.uses[name]
    return found


def code_of(path):
    """Return a notebook's Python."""
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(without_magics(c.source) for c in cells if c.cell_type == "code")
