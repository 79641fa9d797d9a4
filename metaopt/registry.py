"""Finding plugins: names, origins, near misses. Nothing is imported before the first look-up."""

import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pluggy

from metaopt import hooks
from metaopt.errors import PluginError, UnknownPart, did_you_mean, with_article

KINDS = tuple(hooks.HOOKS)
BUILT_IN = ("optimizers", "wrappers", "schedules", "spaces", "tuners", "loggers", "problems")
LONGEST_DESCRIPTION = 150
# packages of this repository, by the first word of the names that they offer
PLUGINS = {
    word: f"metaopt-{word.replace('_', '-')}"
    for word in ("mlflow", "optuna", "pytorch_optimizer", "ray", "slurm", "wandb")
}
# imported when executors are asked for: it imports torch
OWN_EXECUTOR = "metaopt.lab.executors.folder"
OF_ONE_S_OWN = "A part in a module of your own needs --plugin MODULE, or metaopt.register in Python"
# the origin of what `metaopt.register` was given
THIS_PROGRAM = "this program"
NAME = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)?")


@dataclass(frozen=True)
class Entry:
    """One registered part: its name, kind and class, and the distribution that it came with."""

    name: str
    kind: str
    target: Any
    origin: str
    version: str = ""

    @property
    def description(self) -> str:
        """The first paragraph of the part's docstring, of a long one the first sentence."""
        text = " ".join((inspect.getdoc(self.target) or "").split("\n\n")[0].split())
        if len(text) > LONGEST_DESCRIPTION:
            text = text.partition(". ")[0].rstrip(".") + "."
        return text or "(no description)"


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that failed to import or broke a rule, with its error in one line."""

    name: str
    error: str


class Registry:
    """All parts by name. A plugin that fails is recorded and breaks nothing else."""

    def __init__(self) -> None:
        self._entries: dict[str, list[Entry]] = {}
        self._examples: dict[str, tuple[hooks.Example, ...]] = {}
        self._broken: list[BrokenPlugin] = []
        self._plugins = pluggy.PluginManager(hooks.PROJECT)
        self._plugins.add_hookspecs(hooks)
        self._loaded = False

    def find(self, name: str, kind: str | None = None) -> Entry:
        """Return the part of this name. Raises UnknownPart with near misses, PluginError where two plugins offer it."""
        self._load()
        found = self._entries.get(name, [])
        if len(found) > 1:
            origins = " and ".join(sorted({entry.origin for entry in found}))
            raise PluginError(f"{name!r} is offered by {origins}: uninstall one of them, or rename one part")
        if found and kind in (None, found[0].kind):
            return found[0]
        if found:
            raise UnknownPart(
                f"{name!r} is {with_article(found[0].kind)}, not {with_article(kind or '')}. See: metaopt list {kind}s"
            )
        raise UnknownPart(self._unknown(name, kind))

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Return all parts, of one kind or of all, sorted by name."""
        self._load()
        every = (entry for found in self._entries.values() for entry in found)
        return sorted((e for e in every if kind in (None, e.kind)), key=lambda e: (KINDS.index(e.kind), e.name))

    def names(self, kind: str | None = None) -> list[str]:
        """Return all registered names, of one kind or of all."""
        return [entry.name for entry in self.entries(kind)]

    def name_of(self, target: Any) -> str | None:
        """Return the name under which a class is registered, or None."""
        return next((entry.name for entry in self.entries() if entry.target is target), None)

    def examples(self, name: str) -> tuple[hooks.Example, ...]:
        """Return how a part is made when it is checked, as its plugin says; one empty example where it says nothing."""
        self._load()
        return self._examples.get(name, (hooks.Example(),))

    def notes(self, name: str) -> tuple[str, ...]:
        """Return what its plugin says of a part beside the words of its class."""
        return tuple(dict.fromkeys(example.note for example in self.examples(name) if example.note))

    def known_as(self, entry: Entry) -> tuple[str, ...]:
        """Return what others call a part, as its class or its plugin says."""
        said = [name for example in self.examples(entry.name) for name in example.known_as]
        return tuple(dict.fromkeys((*getattr(entry.target, "known_as", ()), *said)))

    def executors(self) -> dict[str, Any]:
        """Return the places where trials run, by name. Raises PluginError if two plugins offer one name."""
        found = dict(import_module(OWN_EXECUTOR).metaopt_executors())
        for origin, offered in self._offers(hooks.EXECUTORS, "a dict of classes"):
            self._check(offered, origin)
            for name, target in offered.items():
                if found.setdefault(name, target) is not target or name == "local":
                    raise PluginError(f"the executor {name!r} is offered twice: uninstall one plugin, or rename it")
        return found

    def suites(self) -> dict[str, tuple[str, ...]]:
        """Return the suites by name: problems as text. Raises PluginError if two plugins offer one name."""
        found: dict[str, tuple[str, ...]] = {}
        form = "{name: [problem as text, ...]}"
        for origin, offered in self._offers(hooks.SUITES, form):
            for name, problems in offered.items():
                if not isinstance(problems, list | tuple) or not all(isinstance(text, str) for text in problems):
                    raise PluginError(f"{origin}: {hooks.SUITES} must return {form}")
                if name in found:
                    raise PluginError(f"the suite {name!r} is offered twice: uninstall one plugin, or rename it")
                found[name] = tuple(problems)
        return found

    def _offers(self, hook: str, form: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what each plugin offers by a hook, with the plugin's name. Raises PluginError where it is no dict."""
        self._load()
        for implementation in getattr(self._plugins.hook, hook).get_hookimpls():
            offered = implementation.function()
            if not isinstance(offered, dict):
                raise PluginError(f"{implementation.plugin_name}: {hook} must return {form}")
            yield implementation.plugin_name, offered

    def broken(self) -> list[BrokenPlugin]:
        """Return the plugins that could not be used, with their errors."""
        self._load()
        return list(self._broken)

    def register(self, **offers: dict[str, Any] | None) -> None:
        """Register parts from a running program; see `metaopt.register`."""
        self._load()
        offered = {kind: offers.get(f"{kind}s") or {} for kind in KINDS}
        for kind, parts in offered.items():
            if not isinstance(parts, dict):
                raise PluginError(
                    f"register: {kind}s is a dict of classes by name, not {with_article(type(parts).__name__)}"
                )
            for name, target in parts.items():
                known = self._entries.get(name, [])
                if any(entry.target is not target and not _made_anew(entry, target) for entry in known):
                    raise PluginError(f"{name!r} is registered already, by {known[0].origin}: choose another name")
        for parts in offered.values():
            self._check(parts, THIS_PROGRAM)
        for kind, parts in offered.items():
            for name, target in parts.items():
                if any(_made_anew(entry, target) for entry in self._entries.get(name, [])):
                    del self._entries[name]
            self._take(kind, parts, THIS_PROGRAM)

    def load_plugin_module(self, name: str) -> None:
        """Import a module by name and take the parts that its hooks offer, or that it registers. Raises PluginError."""
        self._load()
        if name.endswith(".py") or "/" in name:
            raise PluginError(f"--plugin takes the name of a module, such as {Path(name).stem}, not a path: {name!r}")
        try:
            module = import_module(name)
        except (Exception, SystemExit) as error:
            raise PluginError(f"plugin {name!r} cannot be imported: {type(error).__name__}: {error}") from error
        if not self._plugins.is_registered(module):
            self._take_plugin(module, name, "")
        registers = any(getattr(entry.target, "__module__", None) == name for entry in self.entries())
        if not registers and not (self._plugins.get_hookcallers(module) or ()):
            raise PluginError(
                f"plugin {name!r} offers nothing: it has no hook such as {next(iter(hooks.HOOKS.values()))}"
            )

    def _load(self) -> None:
        if self._loaded:
            return
        for module in _built_in_modules():
            self._take_plugin(module, "metaopt", _own_version())
        # set only now: a look-up that failed must fail again, not find an empty registry
        self._loaded = True
        for point in metadata.entry_points(group=hooks.PROJECT):
            origin = point.dist.name if point.dist else point.name
            try:
                self._take_plugin(point.load(), origin, point.dist.version if point.dist else "")
            except (Exception, SystemExit) as error:  # whatever a plugin raises, the others must still work
                self._broken.append(BrokenPlugin(origin, f"{type(error).__name__}: {error}"))

    def _take_plugin(self, plugin: Any, origin: str, version: str) -> None:
        known = {*hooks.HOOKS.values(), hooks.EXAMPLES, hooks.EXECUTORS, hooks.SUITES}
        named = sorted(n for n in dir(plugin) if n.startswith("metaopt_"))
        marked = [n for n in named if getattr(getattr(plugin, n), "metaopt_impl", None) is not None]
        forgotten = [n for n in named if n in known and n not in marked]
        if forgotten:
            raise PluginError(f"plugin {origin!r}: {forgotten[0]} is not marked as a hook: write @hookimpl above it")
        misspelt = [n for n in marked if n not in known]
        if misspelt:
            raise PluginError(
                f"plugin {origin!r} implements no known hook with {misspelt[0]}.{did_you_mean(misspelt[0], known)}"
            )
        if not self._plugins.is_registered(plugin):
            self._register_hooks(plugin, origin)
        try:
            offers = [(kind, self._offered(plugin, hook, origin)) for kind, hook in hooks.HOOKS.items()]
            for _, offered in offers:
                self._check(offered, origin)
            examples = self._offered(plugin, hooks.EXAMPLES, origin)
            self._check_examples(examples, {name for _, parts in offers for name in parts}, origin)
        except PluginError:
            self._plugins.unregister(plugin)  # asked for again, it must fail again
            raise
        # all or nothing: a plugin with one bad part leaves none behind
        for kind, offered in offers:
            self._take(kind, offered, origin, version)
        for name, given in examples.items():
            self._examples[name] = (given,) if isinstance(given, hooks.Example) else tuple(given)

    def _register_hooks(self, plugin: Any, origin: str) -> None:
        try:
            self._plugins.register(plugin)
        except pluggy.PluginValidationError as error:
            reason = " ".join(str(error).split())
            raise PluginError(f"{origin}: a hook is a function without arguments: {reason}") from None

    def _offered(self, plugin: Any, hook: str, origin: str) -> dict[str, Any]:
        for implementation in getattr(self._plugins.hook, hook).get_hookimpls():
            if implementation.plugin is plugin:
                try:
                    offered = implementation.function()
                except (Exception, SystemExit) as error:
                    raise PluginError(f"plugin {origin!r}: {hook} raised {type(error).__name__}: {error}") from error
                if not isinstance(offered, dict):
                    raise PluginError(f"plugin {origin!r}: {hook} returned {type(offered).__name__}, not a dict")
                return offered
        return {}

    def _check_examples(self, examples: dict[str, Any], names: set[str], origin: str) -> None:
        for name, given in examples.items():
            if name not in names:
                raise PluginError(
                    f"{origin}: an example is given for {name!r}, which it does not offer.{did_you_mean(name, names)}"
                )
            listed = [given] if isinstance(given, hooks.Example) else given
            if (
                not isinstance(listed, list | tuple)
                or not listed
                or not all(isinstance(e, hooks.Example) for e in listed)
            ):
                raise PluginError(f"{origin}: the example for {name!r} must be a metaopt.Example or a list of them")

    def _check(self, parts: dict[str, Any], origin: str) -> None:
        for name, target in parts.items():
            if not NAME.fullmatch(name):
                raise PluginError(
                    f"{origin}: a name must be lower-case letters, digits, underscores, at most one dot, got {name!r}"
                )
            if not callable(target):
                raise PluginError(
                    f"{origin}: {name!r} is {with_article(type(target).__name__)}, neither a class nor a factory"
                )

    def _take(self, kind: str, parts: dict[str, Any], origin: str, version: str = "") -> None:
        for name, target in parts.items():
            found = self._entries.setdefault(name, [])
            if not any(entry.target is target for entry in found):
                found.append(Entry(name, kind, target, origin, version))

    def offered_elsewhere(self, name: str) -> str:
        """Return how to come by a name that a package of this repository offers, or an empty text."""
        word = name.partition(".")[0]
        plugin = PLUGINS.get(word)
        if plugin is None or any(known.partition(".")[0] == word for known in self.names()):
            return ""
        for broken in self.broken():
            if broken.name == plugin:
                return f"{name!r} is offered by {plugin}, which is installed and cannot be used: {broken.error}"
        return (
            f"{name!r} is offered by {plugin}, which is not installed: "
            f"pip install -e plugins/{plugin} in a checkout of metaopt"
        )

    def _unknown(self, name: str, kind: str | None) -> str:
        if elsewhere := self.offered_elsewhere(name):
            return elsewhere
        called = kind or "part"
        names = self.names(kind)
        for entry in self.entries(kind):
            if name in self.known_as(entry):
                return f"no {called} is called {name!r}; here it is {entry.name}. See: metaopt show {entry.name}"
        listing = f"metaopt list {kind}s" if kind else "metaopt list"
        return f"no {called} is called {name!r}.{did_you_mean(name, names)} See: {listing}. {OF_ONE_S_OWN}"


def _made_anew(entry: Entry, target: Any) -> bool:
    """Return whether a program offers a new version of a part: a cell of a notebook, or a module, has run again."""
    return entry.origin == THIS_PROGRAM and _module_of(entry.target) == _module_of(target)


def _module_of(target: Any) -> str | None:
    own: str | None = getattr(getattr(target, "func", target), "__module__", None)  # of what a partial calls
    return own


def _built_in_modules() -> list[Any]:
    """Import every module of the folders of built-in parts: the folder is the list."""
    packages = [import_module(f"metaopt.{folder}") for folder in BUILT_IN]
    return [
        import_module(f"{package.__name__}.{found.name}")
        for package in packages
        for found in pkgutil.iter_modules(package.__path__)
    ]


def _own_version() -> str:
    try:
        return metadata.version("metaopt-torch")
    except metadata.PackageNotFoundError:  # a bare checkout on the path
        return ""


registry = Registry()


def register(
    *,
    optimizers: dict[str, Any] | None = None,
    wrappers: dict[str, Any] | None = None,
    schedules: dict[str, Any] | None = None,
    spaces: dict[str, Any] | None = None,
    tuners: dict[str, Any] | None = None,
    loggers: dict[str, Any] | None = None,
    problems: dict[str, Any] | None = None,
) -> None:
    """Register parts from a script: `metaopt.register(optimizers={"mine": Mine})`.

    A module, or a notebook, that registers a name once more replaces what it registered before. Raises PluginError.
    """
    registry.register(
        optimizers=optimizers,
        wrappers=wrappers,
        schedules=schedules,
        spaces=spaces,
        tuners=tuners,
        loggers=loggers,
        problems=problems,
    )
