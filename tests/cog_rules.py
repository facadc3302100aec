"""What Cog from 0.17 on reads of a predictor without running it, and what it refuses.

The rules are those of its static parser, by hand: the inputs are the parameters of `predict` in the class that cog.yaml
names, in its own file; annotations, defaults and choices have to be literals, or names of literals in the same file.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

TYPES: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "Path": {"type": "string", "format": "uri"},
    "Secret": {"type": "string", "format": "password", "writeOnly": True, "x-cog-secret": True},
}
SAID = ("default", "description", "ge", "le", "choices", "deprecated")


class Broken(Exception):
    """A rule is broken."""


@dataclass(frozen=True)
class Reading:
    """What was read."""

    inputs: dict[str, Any]
    """The component Input."""
    output: dict[str, Any]
    enums: dict[str, Any]
    """The components of choices."""


def read(source: str, name: str) -> Reading:
    """The inputs and the output of the class `name` in a file's text. Raises Broken."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("exec", "eval"):
            raise Broken(f"{node.func.id}: what it makes cannot be read")
        if "__signature__" in (getattr(node, "attr", ""), getattr(node, "id", "")):
            raise Broken("__signature__ cannot be read")
    known = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        raise Broken(f"no class {name} in this file")
    function = _method(classes, name)
    arguments = function.args
    if arguments.vararg or arguments.kwarg:
        raise Broken("*args and **kwargs name no inputs")
    if arguments.posonlyargs or arguments.kwonlyargs or not arguments.args or arguments.args[0].arg != "self":
        raise Broken("inputs are the plain parameters behind self")
    parameters = arguments.args[1:]
    defaults: list[ast.expr | None] = [None] * (len(parameters) - len(arguments.defaults)) + list(arguments.defaults)
    properties, required, enums = {}, [], {}
    for order, (parameter, default) in enumerate(zip(parameters, defaults, strict=True)):
        body, needed, choices = _input(parameter, default, known)
        properties[parameter.arg] = body | {"x-order": order}
        if needed:
            required.append(parameter.arg)
        if choices is not None:
            enums[parameter.arg] = {
                "title": parameter.arg,
                "description": "An enumeration.",
                "type": "string",
                "enum": choices,
            }
    inputs = {"title": "Input", "type": "object", "required": required, "properties": properties}
    return Reading(inputs, _output(function.returns), enums)


def _method(classes: dict[str, ast.ClassDef], name: str) -> ast.FunctionDef:
    """`run` or `predict` of a class, or of a parent in the same file: no other is looked at."""
    waiting = [name]
    while waiting:
        here = classes.get(waiting.pop(0))
        if here is None:
            continue
        for wanted in ("run", "predict"):
            for node in here.body:
                if isinstance(node, ast.FunctionDef) and node.name == wanted:
                    return node
        waiting += [base.id for base in here.bases if isinstance(base, ast.Name)]
    raise Broken(f"{name} must define run() or predict()")


def _input(
    parameter: ast.arg, default: ast.expr | None, known: dict[str, ast.expr]
) -> tuple[dict[str, Any], bool, list[str] | None]:
    """The property, whether it has to be given, and its choices."""
    kind, optional = _annotation(parameter)
    said: dict[str, Any] = {}
    if isinstance(default, ast.Call):
        said = _said(parameter.arg, default, known)
    elif default is not None:
        said = {"default": _literal(default, known)}
    missing = "default" not in said
    if not missing and said["default"] is None and not optional:
        raise Broken(f"{parameter.arg}: default None makes it required, as it is not Optional")
    body: dict[str, Any] = {"description": said["description"]} if "description" in said else {}
    choices = said.get("choices")
    if choices is not None:
        if kind != "str":
            raise Broken(f"{parameter.arg}: choices of {kind}")
        if not missing and said["default"] not in [*choices, None]:
            raise Broken(f"{parameter.arg}: the default is no choice")
        body["allOf"] = [{"$ref": f"#/components/schemas/{parameter.arg}"}]
    else:
        body |= TYPES[kind] | {"title": parameter.arg.replace("_", " ").title()}
    if said.get("default") is not None:
        body["default"] = said["default"]
    if optional:
        body["nullable"] = True
    for name, key in (("ge", "minimum"), ("le", "maximum")):
        if name in said:
            if kind not in ("int", "float"):
                raise Broken(f"{parameter.arg}: {name} of {kind}")
            body[key] = said[name]
    return body, missing and not optional, choices


def _annotation(parameter: ast.arg) -> tuple[str, bool]:
    """The type's name, and whether it is Optional."""
    node, optional = parameter.annotation, False
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Optional":
        node, optional = node.slice, True
    if not isinstance(node, ast.Name) or node.id not in TYPES:
        said = ast.unparse(node) if node else "nothing"
        raise Broken(f"{parameter.arg}: {said} is no type of an input")
    return node.id, optional


def _said(name: str, call: ast.Call, known: dict[str, ast.expr]) -> dict[str, Any]:
    """What Input(...) is told."""
    if not isinstance(call.func, ast.Name) or call.func.id != "Input":
        raise Broken(f"{name}: only Input(...) is read")
    said: dict[str, Any] = {"default": _literal(call.args[0], known)} if call.args else {}
    for keyword in call.keywords:
        if keyword.arg not in SAID:
            raise Broken(f"{name}: Input takes no {keyword.arg}")
        resolve = _choices if keyword.arg == "choices" else _literal
        said[keyword.arg] = resolve(keyword.value, known)
    return said


def _literal(node: ast.expr, known: dict[str, ast.expr]) -> Any:
    """A literal, or a name that stands for one in the same file."""
    if isinstance(node, ast.Name):
        if node.id not in known:
            raise Broken(f"{node.id} is not known in this file")
        node = known[node.id]
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise Broken(f"{ast.unparse(node)} is no literal") from None


def _choices(node: ast.expr, known: dict[str, ast.expr]) -> list[Any]:
    """A list, or list(D.keys()) or list(D.values()) of a dict in the same file, or a sum of such."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _choices(node.left, known) + _choices(node.right, known)
    match node:
        case ast.Call(
            func=ast.Name(id="list"),
            args=[ast.Call(func=ast.Attribute(value=ast.Name(id=table), attr="keys" | "values" as part), args=[])],
        ):
            found = _literal(ast.Name(table), known)
            if isinstance(found, dict):
                return list(getattr(found, part)())
    found = _literal(node, known)
    if not isinstance(found, list):
        raise Broken(f"choices {ast.unparse(node)} are no list")
    return found


def _output(node: ast.expr | None) -> dict[str, Any]:
    """A type, or a list of one."""
    match node:
        case ast.Name(id=kind) if kind in TYPES:
            return {"title": "Output"} | TYPES[kind]
        case ast.Subscript(value=ast.Name(id="list"), slice=ast.Name(id=kind)) if kind in TYPES:
            return {"title": "Output", "type": "array", "items": TYPES[kind]}
    raise Broken(f"{ast.unparse(node) if node else 'nothing'} is no type of an output")
